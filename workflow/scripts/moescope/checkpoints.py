"""Series of checkpoints: which steps there are, what a checkpoint consists of, its manifest, and loading it.

Only the standard library is imported here, because the workflow asks for steps and files before any job runs; torch and
transformers come with the first model that is loaded.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import re
import struct
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moescope import files, fused
from moescope.errors import MoescopeError

_STEP = re.compile(r"(?:^|[^a-z])(?:global[-_]?)?(?:step|checkpoint|ckpt|iter(?:ation)?)[-_=]?0*(\d+)", re.IGNORECASE)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
#: What belongs to a checkpoint in Hugging Face format, beside the weights.
_SIDE_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", *_TOKENIZER_FILES)
#: Names of one quantity in the configurations of transformers, in order of preference.
_SHAPE_KEYS = {
    "layers": ("num_hidden_layers", "n_layer"),
    "d": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "K": ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"),
    "I": ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim"),
    "shared_I": ("shared_expert_intermediate_size", "shared_intermediate_size"),
}
_GGUF_KEYS = {
    "layers": "block_count",
    "d": "embedding_length",
    "heads": "attention.head_count",
    "experts": "expert_count",
    "I": "feed_forward_length",
}


class CheckpointError(MoescopeError):
    """A checkpoint or a series that is not there, not whole, or not to be trusted."""


def step_of(name: str) -> int:
    """The training step in a directory's name (``step1000-tokens4B``, ``checkpoint-500``, ``1000``); 0 without one."""
    if name.isdecimal():
        return int(name)
    match = _STEP.search(name)
    return int(match[1]) if match else 0


def on_disk(path: str, gguf_file: str | None = None) -> dict[int, Path]:
    """The checkpoints that a directory or a glob names, by step, ascending.

    Raises CheckpointError where nothing matches, where a directory holds no checkpoint, and where two directories have
    one step.
    """
    found: dict[int, Path] = {}
    place = os.path.expanduser(path)
    matches = [place] if os.path.isdir(place) else glob.glob(place)  # a directory's own name may hold brackets
    for directory in sorted(Path(p) for p in matches if os.path.isdir(p)):
        step = step_of(directory.name)
        if step in found:
            raise CheckpointError(
                f"{path}: {found[step]} and {directory} are both step {step}; narrow the pattern or rename one"
            )
        found[step] = directory
    if not found:
        raise CheckpointError(f"{path}: no checkpoint directory matches; correct the path of the series")
    for directory in found.values():
        checkpoint_files(directory, gguf_file)
    return dict(sorted(found.items()))


def checkpoint_files(directory: str | os.PathLike, gguf_file: str | None = None) -> list[Path]:
    """The files that a checkpoint consists of: weights, configuration, tokenizer.

    Raises CheckpointError where the configuration, the weights or a part of them are missing, or come as pickles only.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such folder; correct the path")
    if gguf_file is not None:
        if not (directory / gguf_file).is_file():
            raise CheckpointError(f"{directory}: has no file {gguf_file}; correct gguf_file or the path of the series")
        # transformers prefers a tokenizer that lies beside the file to the one inside
        return [directory / gguf_file, *_present(directory, _TOKENIZER_FILES)]
    if not (directory / "config.json").is_file():
        cure = "name the GGUF file in gguf_file" if any(directory.glob("*.gguf")) else "correct the path of the series"
        raise CheckpointError(f"{directory}: has no config.json, so it is no Hugging Face checkpoint; {cure}")
    weights = _weights(directory)
    if not weights:
        pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
        what = "its weights are pickles, which can run code; save them as" if pickled else "has no weights; put in"
        raise CheckpointError(f"{directory}: {what} safetensors (model.save_pretrained does)")
    return [*_present(directory, _SIDE_FILES), *weights]


def _present(directory: Path, names: Iterable[str]) -> list[Path]:
    return [directory / name for name in names if (directory / name).is_file()]


def _weights(directory: Path) -> list[Path]:
    """The weight files that transformers would load: one file or the shards of an index, none beside them."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted({directory / name for name in named})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is no index of weight files; fetch it again") from error
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{missing[0]}: is not there, though the index of the weights names it; fetch it again")
    return shards


def select_steps(series: str, available: Iterable[int], steps: Any = "all") -> list[int]:
    """The steps of a series that a ``steps`` entry of the configuration asks for, ascending.

    ``all``; ``last``; a list; ``{every: n}`` (every n-th one listed, from the first); ``{log: n}`` (n log-spaced ones
    among the positive steps, each snapped to the nearest on that scale); ``{nearest: [..]}``; ties go to the earlier
    step. Raises CheckpointError on a step that is not there, naming its neighbours, and on a series without steps.
    """
    available = sorted(available)
    if not available:
        raise CheckpointError(f"{series}: the series has no checkpoints")
    if steps == "all":
        return available
    if steps == "last":
        return available[-1:]
    if isinstance(steps, Mapping):
        ((kind, value),) = steps.items()
        if kind == "every":
            return available[::value]
        if kind == "log":
            return _log_spaced(available, value)
        return sorted({min(available, key=lambda s: (abs(s - wanted), s)) for wanted in value})
    for step in steps:
        if step not in available:
            near = sorted(sorted(available, key=lambda s: abs(s - step))[:4])
            raise CheckpointError(
                f"{series}: step {step} is not in the series; its neighbours are {', '.join(map(str, near))}"
            )
    return sorted(set(steps))


def _log_spaced(available: list[int], n: int) -> list[int]:
    positive = [s for s in available if s > 0] or available
    if n == 1 or len(positive) <= 1:
        return positive[-1:]
    first, last = math.log(positive[0]), math.log(positive[-1])
    wanted = [first + (last - first) * i / (n - 1) for i in range(n)]
    # rounded, because a step half-way between two others is so in exact arithmetic only
    return sorted({min(positive, key=lambda s: (round(abs(math.log(s) - w), 9), s)) for w in wanted})


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a model of this configuration routes between experts."""
    return bool(_first(config, _SHAPE_KEYS["experts"]))


def read_config(directory: str | os.PathLike) -> dict:
    """The configuration of a checkpoint in Hugging Face format (the text part of a multimodal one)."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is no configuration of a model; fetch the file again")
    return config.get("text_config") or config


def manifest(
    series: str,
    step: int,
    source: str,
    directory: str | os.PathLike,
    gguf_file: str | None = None,
    tokens: int | None = None,
) -> dict:
    """What a checkpoint is, without its weights: shape, size and sha256 of every file.

    ``tokens``: seen in training until then, None where unknown. ``parameters`` of the shape counts the numbers in the
    weight files: tied embeddings once, as save_pretrained stores them. Raises CheckpointError on a damaged file.
    """
    paths = checkpoint_files(directory, gguf_file)
    shape = _gguf_shape(paths[0]) if gguf_file else _shape(directory, paths)
    return {
        "series": series,
        "step": step,
        "tokens": tokens,
        "source": source,
        "directory": str(directory),
        "gguf_file": gguf_file,
        "shape": shape,
        "revision": None,
        "commit": None,
        "files": {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in paths},
    }


def _shape(directory: str | os.PathLike, paths: list[Path]) -> dict[str, int | None]:
    config = read_config(directory)
    shape = {name: _first(config, keys) for name, keys in _SHAPE_KEYS.items()}
    if not shape["experts"]:
        shape |= {"experts": 0, "K": 0, "I": _first(config, ("intermediate_size", "n_inner", "ffn_dim"))}
    elif not shape["shared_I"] and (shared := _first(config, ("n_shared_experts", "num_shared_experts"))):
        shape["shared_I"] = shared * shape["I"]
    shape["shared_I"] = shape["shared_I"] or 0
    headers = [safetensors_header(p) for p in paths if p.suffix == ".safetensors"]
    return shape | {"parameters": sum(math.prod(t["shape"]) for header in headers for t in header.values())}


def _gguf_shape(path: Path) -> dict[str, int | None]:
    from gguf import GGUFReader  # reads the whole token list: seconds, and only where a GGUF file is used

    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except Exception as error:  # the reader meets damage unprepared: IndexError, OverflowError, KeyError, ...
        raise CheckpointError(f"{path}: cannot be read as GGUF ({_reason(error)}); fetch the file again") from error
    fields = {name: reader.fields.get(f"{architecture}.{key}") for name, key in _GGUF_KEYS.items()}
    shape = {name: field.contents() if field else None for name, field in fields.items()}
    if shape["experts"]:
        raise CheckpointError(
            f"{path}: routes between experts, and only dense models are read from GGUF; use the Hugging Face format"
        )
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return shape | {"experts": 0, "K": 0, "shared_I": 0, "parameters": parameters}


def _first(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


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
        raise CheckpointError(f"{path}: is no whole safetensors file ({_reason(error)}); fetch it again") from error
    if 8 + length + end > size:
        raise CheckpointError(f"{path}: is cut short; fetch it again")
    return header


@contextlib.contextmanager
def acquire(entry: Mapping[str, Any]) -> Iterator[Path]:
    """The directory to load the checkpoint from that a manifest describes, while the block runs: its own, or that of a
    copy that can be mapped into memory (``fused``).

    Raises CheckpointError where a file is gone or has another size than the manifest says, or where transformers does
    not know what to do with it, and FusedError where no copy can be made.
    """
    directory = Path(entry["directory"])
    for name, facts in entry["files"].items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{path}: is not the file of the manifest any more; run the workflow again")
    if entry["shape"]["experts"] and not entry["gguf_file"]:
        with _told_in_one_line(f"{directory}: the model", "fetch it again or leave the step out"):
            directory = fused.mappable(directory, entry["files"], [n for n in entry["files"] if n in _SIDE_FILES])
    yield directory


def load(
    directory: str | os.PathLike, dtype: str = "auto", device: str = "cpu", gguf_file: str | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint on disk: safetensors or GGUF, no code of the checkpoint is run.

    ``dtype`` is what the weights are stored in: ``auto`` keeps that of the files. GGUF is dequantised to float32, and
    files of several dtypes are float32 throughout, unless the model itself keeps those in float32 that do not have the
    commonest. Raises CheckpointError where weights are missing, have the wrong shape, hold a NaN or an infinity, or are
    more than all GPUs hold.
    """
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # parallel loading holds up to half the model twice
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = Path(directory)
    paths = checkpoint_files(directory, gguf_file)
    common, others = _stored_dtypes(paths)
    place = paths[0] if gguf_file else directory
    # unless told otherwise, transformers asks on the terminal whether to run the code that comes with a checkpoint
    source = {"local_files_only": True, "trust_remote_code": False, **({"gguf_file": gguf_file} if gguf_file else {})}
    spread = _over_gpus(device, sum(path.stat().st_size for path in paths))
    how = {**source, **({} if gguf_file else {"use_safetensors": True}), **spread}

    def read(stored: str) -> tuple[Any, dict]:
        with _told_in_one_line(f"{place}: the model", "fetch it again or leave the step out"):
            return AutoModelForCausalLM.from_pretrained(
                directory, **how, dtype=getattr(torch, stored), output_loading_info=True, ignore_mismatched_sizes=True
            )

    model, info = read(common if dtype == "auto" else dtype)
    if dtype == "auto" and common != "float32" and others:
        held = {name: weight.dtype for name, weight in model.state_dict().items()}
        if any(held.get(name) != torch.float32 for name in others):
            model, info = read("float32")
    if any(weight.is_meta for weight in model.parameters()):
        raise CheckpointError(f"{place}: the GPUs together do not hold its weights; give the job more or larger ones")
    for problem, what in {"missing_keys": "is missing", "mismatched_keys": "has the wrong shape"}.items():
        if keys := sorted(key if isinstance(key, str) else key[0] for key in info.get(problem, ())):
            raise CheckpointError(f"{place}: {keys[0]} {what}; fetch the checkpoint again or leave the step out")
    with _told_in_one_line(f"{place}: the tokenizer", "put the files of tokenizer.save_pretrained there"):
        tokenizer = AutoTokenizer.from_pretrained(directory, **source)
    for name, weight in () if fused.checked(directory) else model.named_parameters():
        if not fused.finite(weight):
            raise CheckpointError(
                f"{place}: {name} holds a NaN or an infinity; fetch the checkpoint again or leave the step out"
            )
    return (model if spread else model.to(device)).eval(), tokenizer


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
def _told_in_one_line(what: str, cure: str) -> Iterator[None]:
    """Whatever goes wrong with a file of somebody else's inside transformers, as one line that names the file."""
    try:
        yield
    except MoescopeError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} cannot be loaded ({_reason(error)}); {cure}") from error


def _reason(error: Exception) -> str:
    """The type and the beginning of an error's message."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


def _stored_dtypes(paths: list[Path]) -> tuple[str, list[str]]:
    """The floating dtype of most weights (of a GGUF file: float32), and the names of those that have another."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    headers = [safetensors_header(path) for path in paths if path.suffix == ".safetensors"]
    found = {name: tensor for header in headers for name, tensor in header.items() if tensor["dtype"] in names}
    count: Counter[str] = Counter()
    for tensor in found.values():
        count[tensor["dtype"]] += math.prod(tensor["shape"])
    common = max(sorted(count), key=count.get, default="F32")
    # old checkpoints hold frequencies of rotary embeddings, which a model computes
    others = [n for n, tensor in found.items() if tensor["dtype"] != common and not n.endswith("rotary_emb.inv_freq")]
    return names[common], others
