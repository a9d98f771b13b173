"""Loading a checkpoint: a model and its tokenizer from files on disk, or one line that says why not.

No code of the checkpoint is run. torch and transformers come with the first model that is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moescope import fused, layout
from moescope.errors import MoescopeError
from moescope.layout import CheckpointError

_CURE = "fetch it again or leave the step out"
#: Of each tensor, so many runs of so many numbers go into the fingerprint of a model.
_RUNS, _RUN = 16, 256


def load(
    directory: str | os.PathLike,
    dtype: str = "auto",
    device: str = "cpu",
    gguf_file: str | None = None,
    allow_pickle: bool = False,
    checked: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint on disk: safetensors or GGUF, no code of the checkpoint is run.

    ``dtype`` is what the weights are stored in: ``auto`` keeps that of the files. GGUF is dequantised to float32, and
    files of several dtypes are float32 throughout, unless the model itself keeps those in float32 that do not have the
    commonest. ``allow_pickle``: weights that come as pickles only are read too, tensors and nothing else. ``checked``:
    they are known to be finite. Raises CheckpointError where weights are missing, have the wrong shape, hold a NaN or
    an infinity, or are more than all GPUs hold.
    """
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # parallel loading holds up to half the model twice
    from transformers import AutoTokenizer

    directory = Path(directory)
    paths = layout.checkpoint_files(directory, gguf_file, allow_pickle)
    place = paths[0] if gguf_file else directory
    # unless told otherwise, transformers asks on the terminal whether to run the code that comes with a checkpoint
    source = {"local_files_only": True, "trust_remote_code": False, **({"gguf_file": gguf_file} if gguf_file else {})}
    spread = _over_gpus(device, sum(path.stat().st_size for path in paths))
    model, info = _read(place, directory, paths, dtype, {**source, **spread})
    _require_complete(place, model, info)
    with told_in_one_line(f"{place}: the tokenizer", "put the files of tokenizer.save_pretrained there"):
        tokenizer = AutoTokenizer.from_pretrained(directory, **source)
    for name, weight in () if checked else model.named_parameters():
        if not fused.finite(weight):
            raise CheckpointError(f"{place}: {name} holds a NaN or an infinity; {_CURE}")
    return (model if spread else model.to(device)).eval(), tokenizer


def _read(place: Path, directory: Path, paths: list[Path], dtype: str, how: Mapping[str, Any]) -> tuple[Any, dict]:
    """(model, what transformers found missing or wrong) from the files of a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    safe = any(path.suffix == ".safetensors" for path in paths)
    form = {} if "gguf_file" in how else {"use_safetensors": True} if safe else {"weights_only": True}

    def read(stored: Any) -> tuple[Any, dict]:
        with told_in_one_line(f"{place}: the model", _CURE):
            return AutoModelForCausalLM.from_pretrained(
                directory, **how, **form, dtype=stored, output_loading_info=True, ignore_mismatched_sizes=True
            )

    if dtype != "auto":
        return read(getattr(torch, dtype))
    if "weights_only" in form:
        return read("auto")
    common, others = _stored_dtypes(paths)
    model, info = read(getattr(torch, common))
    if common != "float32" and others:
        held = {name: weight.dtype for name, weight in model.state_dict().items()}
        if any(held.get(name) != torch.float32 for name in others):
            return read(torch.float32)
    return model, info


def _require_complete(place: Path, model: Any, info: Mapping[str, Any]) -> None:
    """Raises CheckpointError where weights are missing, have the wrong shape, or lie nowhere."""
    if any(weight.is_meta for weight in model.parameters()):
        raise CheckpointError(f"{place}: the GPUs together do not hold its weights; give the job more or larger ones")
    for problem, what in {"missing_keys": "is missing", "mismatched_keys": "has the wrong shape"}.items():
        if keys := sorted(key if isinstance(key, str) else key[0] for key in info.get(problem, ())):
            raise CheckpointError(f"{place}: {keys[0]} {what}; {_CURE}")


def fingerprint(model: Any) -> str:
    """What identifies the weights of a model however they are stored: a hash of name, shape and parts of each tensor.

    Parts, spread evenly, because a training step changes all of a tensor, and a model may be larger than the memory.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        flat = weight.detach().reshape(-1)
        for run in range(_RUNS):
            start = max(0, flat.numel() - _RUN) * run // (_RUNS - 1)
            digest.update(flat[start : start + _RUN].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _over_gpus(device: str, size: int) -> dict[str, Any]:
    """How to spread weights of so many bytes over several GPUs: nothing where one holds them, or there is but one.

    Never to the CPU or the disk: weights that are offloaded could not be read. A third of each GPU is left to layers in
    float32 and to scoring.
    """
    import torch

    if device != "cuda" or torch.cuda.device_count() < 2:
        return {}
    room = {gpu: torch.cuda.mem_get_info(gpu)[0] * 2 // 3 for gpu in range(torch.cuda.device_count())}
    return {} if size <= room[0] else {"device_map": "auto", "max_memory": room}


@contextlib.contextmanager
def told_in_one_line(what: str, cure: str) -> Iterator[None]:
    """Whatever goes wrong with a file of somebody else's inside transformers, as one line that names the file."""
    try:
        yield
    except MoescopeError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} cannot be loaded ({layout.reason(error)}); {cure}") from error


def _stored_dtypes(paths: list[Path]) -> tuple[str, list[str]]:
    """The floating dtype of most weights, and the names of those that have another (of a GGUF file: float32, none)."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    headers = [layout.safetensors_header(path) for path in paths if path.suffix == ".safetensors"]
    found = {name: tensor for header in headers for name, tensor in header.items() if tensor["dtype"] in names}
    count: Counter[str] = Counter()
    for tensor in found.values():
        count[tensor["dtype"]] += math.prod(tensor["shape"])
    common = max(sorted(count), key=count.get, default="F32")
    # old checkpoints hold frequencies of rotary embeddings, which a model computes
    others = [n for n, tensor in found.items() if tensor["dtype"] != common and not n.endswith("rotary_emb.inv_freq")]
    return names[common], others
