"""A model for a notebook: from a directory or from the hub, and known to fit before anything is asked of it."""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path
from typing import Any

from moescope import checkpoints, layout, loading, manifests
from moescope.errors import MoescopeError
from moescope.layout import CheckpointError

#: Token ids of the two texts that a model is tried on, as shares of its vocabulary.
_TRIED = ((0.61, 0.13, 0.42, 0.87), (0.24, 0.05, 0.71, 0.33, 0.92, 0.56, 0.17))


def load(
    where: str | os.PathLike,
    revision: str = "main",
    dtype: str = "auto",
    device: str = "cpu",
    gguf_file: str | None = None,
    allow_pickle: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint: a directory, or the name of a hub repository (``owner/name``).

    ``revision`` (of a repository): branch, tag or commit. It is fetched into the store, checked against the hashes of
    its listing, and held there for as long as the model lives. ``dtype``: what weights are stored in (``auto``: as in
    the files; computation is float32). Raises CheckpointError or HubError where it cannot be read, DecompositionError
    or ReadoutError, with the measured error, where the model has no residual stream that can be taken apart.
    """
    if Path(where).is_dir():
        model, tokenizer = loading.load(where, dtype, device, gguf_file, allow_pickle)
    elif gguf_file or not _names_a_repository(os.fspath(where)):
        raise CheckpointError(f"{where}: is no directory; name one, or a repository of the hub (owner/name)")
    else:
        entry = manifests.on_hub(os.fspath(where), None, os.fspath(where), revision, allow_pickle=allow_pickle)
        with contextlib.ExitStack() as holding:
            model, tokenizer = holding.enter_context(checkpoints.opened(entry, dtype, device))
            weakref.finalize(model, holding.pop_all().close)
    require_fit(model)
    return model, tokenizer


def require_fit(model: Any) -> float:
    """The error of the decomposition on a few tokens, of a layer's update.

    Raises DecompositionError where it is too large, where weights cannot be read, or where what the layers do cannot be
    followed at all, ReadoutError where the logits are not those of the last residual.
    """
    from moescope.decomposition import DecompositionError

    try:
        return _tried(model)
    except (MoescopeError, MemoryError):
        raise
    except Exception as error:  # code of another build than ours meets: a wrong number of axes, a missing name
        raise DecompositionError(
            f"{type(model).__name__}: what its layers do cannot be followed ({layout.reason(error)}); not supported"
        ) from error


def _tried(model: Any) -> float:
    import torch

    from moescope.clean import batched
    from moescope.decomposition import Decomposition
    from moescope.precision import computing_in_float32
    from moescope.readout import Readout

    decomposition = Decomposition(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    texts = [tuple(int(share * vocabulary) for share in shares) for shares in _TRIED]
    with torch.no_grad(), computing_in_float32(model):
        trace = decomposition.trace(batched(texts, decomposition.device))
        error = trace.verified()
        Readout.of(decomposition, trace, torch.tensor([text[-1] for text in texts], device=decomposition.device))
    return error


def _names_a_repository(where: str) -> bool:
    """Whether it is ``owner/name``, and nothing that begins or lies on this disk."""
    owner, _, name = where.partition("/")
    return bool(owner and name) and "/" not in name and owner[0] not in ".~" and not Path(owner).exists()
