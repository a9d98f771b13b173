"""Which files a checkpoint consists of: in a folder on disk, or in the listing of a repository. No weights are read.

A checkpoint is somebody else's: no name may lead out of its folder, and pickles, which can run code, count only where
they are allowed.
"""

from __future__ import annotations

import glob
import json
import os
import struct
import textwrap
from collections.abc import Callable, Collection
from pathlib import Path

from moescope import files, steps
from moescope.errors import MoescopeError

#: Files of a tokenizer that decide how text becomes tokens; with the others, all of a tokenizer.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json")
#: Weights as transformers looks for them, the safe ones first: one file, or the index of several.
_SAFE = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
#: What belongs to a checkpoint in Hugging Face format, beside the weights.
SIDE_FILES = ("config.json", "generation_config.json", _SAFE[1], _PICKLED[1], *TOKENIZER_FILES)


class CheckpointError(MoescopeError):
    """A checkpoint or a series that is not there, not whole, or not to be trusted."""


def on_disk(path: str, gguf_file: str | None = None, allow_pickle: bool = False) -> dict[int, Path]:
    """The checkpoints that a directory or a glob names, by step, ascending.

    Raises CheckpointError where nothing matches, where a directory holds no checkpoint, and where two directories have
    one step.
    """
    found: dict[int, Path] = {}
    place = os.path.expanduser(path)
    matches = [place] if os.path.isdir(place) else glob.glob(place)  # a directory's own name may hold brackets
    for directory in sorted(Path(p) for p in matches if os.path.isdir(p)):
        step = steps.step_of(directory.name)
        if step in found:
            raise CheckpointError(
                f"{path}: {found[step]} and {directory} are both step {step}; narrow the pattern or rename one"
            )
        found[step] = directory
    if not found:
        raise CheckpointError(f"{path}: no checkpoint directory matches; correct the path of the series")
    for directory in found.values():
        checkpoint_files(directory, gguf_file, allow_pickle)
    return dict(sorted(found.items()))


def checkpoint_files(
    directory: str | os.PathLike, gguf_file: str | None = None, allow_pickle: bool = False
) -> list[Path]:
    """The files of a checkpoint on disk: configuration, tokenizer, weights (GGUF: the file, and a tokenizer beside it).

    Raises CheckpointError where the configuration, the weights or a part of them are missing, come as pickles that are
    not allowed, or lie outside the folder; UnsafeNameError where a name leads there.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such folder; correct the path")
    there = {path.name for path in directory.iterdir() if path.is_file()}
    if gguf_file is not None:
        files.require_inside(gguf_file, str(directory))
        if not (directory / gguf_file).is_file():
            raise CheckpointError(f"{directory}: has no file {gguf_file}; correct gguf_file or the path of the series")
        # transformers prefers a tokenizer that lies beside the file to the one inside
        names = [gguf_file, *(name for name in TOKENIZER_FILES if name in there)]
    else:
        if "config.json" not in there:
            gguf = any(name.endswith(".gguf") for name in there)
            cure = "name the GGUF file in gguf_file" if gguf else "correct the path of the series"
            raise CheckpointError(f"{directory}: has no config.json, so it is no Hugging Face checkpoint; {cure}")
        names = belonging(str(directory), there, lambda name: (directory / name).read_bytes(), allow_pickle)
        if lacking := next((name for name in names if not (directory / name).is_file()), None):
            raise CheckpointError(
                f"{directory / lacking}: is not there, though the index of the weights names it; fetch it again"
            )
    return [_inside(directory, name) for name in names]


def belonging(where: str, there: Collection[str], read: Callable[[str], bytes], allow_pickle: bool) -> list[str]:
    """The names of the files of a checkpoint in Hugging Face format among those that are ``there``: what is beside the
    weights, then the weights that transformers would load. Shards that the index of the weights names are among them
    whether they are there or not. ``read`` gives the content of a file.

    Raises CheckpointError where there are no weights, or only pickles that are not allowed.
    """
    weights = _weights(where, there, read, _SAFE)
    if not weights and allow_pickle:
        weights = _weights(where, there, read, _PICKLED)
    if not weights:
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in there)
        what = "its weights are pickles, which can run code; save them as" if pickled else "has no weights; put in"
        cure = ", or write allow_pickle: true if you trust it" if pickled else ""
        raise CheckpointError(f"{where}: {what} safetensors (model.save_pretrained does){cure}")
    return [*(name for name in SIDE_FILES if name in there), *weights]


def _weights(where: str, there: Collection[str], read: Callable[[str], bytes], forms: tuple[str, str]) -> list[str]:
    """The weight files of one form: a single one or the shards of an index, none beside them."""
    whole, index = forms
    if whole in there:
        return [whole]
    if index not in there:
        return []
    try:
        shards = sorted(f"{name:s}" for name in set(json.loads(read(index))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}/{index}: is no index of weight files; fetch it again") from error
    if strange := next((n for n in shards if Path(files.require_inside(n, where)).suffix != Path(whole).suffix), None):
        raise CheckpointError(
            f"{where}/{index}: names {strange!r}, which is no weight file; do not use this checkpoint"
        )
    return shards


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint holds weights."""
    return name not in SIDE_FILES


def _inside(directory: Path, name: str) -> Path:
    """A file of the folder itself, or of the store of the hub's own cache, whose folders hold links into it."""
    path, folder = directory / name, directory.resolve()
    cache = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    real = path.resolve()
    if not (real.is_relative_to(folder) or real.is_relative_to(cache)):
        raise CheckpointError(f"{path}: is a link out of its folder; put the file itself there")
    return path


def safetensors_header(path: str | os.PathLike) -> dict[str, dict]:
    """Name -> dtype and shape of the tensors of a safetensors file; CheckpointError where it is none, or cut short."""
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("the header is cut")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
        if not all(isinstance(t["dtype"], str) and isinstance(t["shape"], list) for t in header.values()):
            raise ValueError("a tensor has no dtype or no shape")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path}: is no whole safetensors file ({reason(error)}); fetch it again") from error
    if 8 + length + end > size:
        raise CheckpointError(f"{path}: is cut short; fetch it again")
    return header


def reason(error: Exception) -> str:
    """The type and the beginning of an error's message."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
