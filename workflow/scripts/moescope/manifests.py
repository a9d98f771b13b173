"""Manifests: what a checkpoint is, on disk or on the hub, without its weights. Shape, files, sizes and hashes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moescope import files, hub, layout
from moescope.layout import CheckpointError

#: Names of one quantity in the configurations of transformers, in order of preference.
_SHAPE_KEYS = {
    "layers": ("num_hidden_layers", "n_layer"),
    "d": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "K": ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"),
    "I": ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim"),
    "shared_I": (
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
    "shared": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
}
_GGUF_KEYS = {
    "layers": "block_count",
    "d": "embedding_length",
    "heads": "attention.head_count",
    "experts": "expert_count",
    "I": "feed_forward_length",
}


def on_disk(
    series: str,
    step: int,
    directory: str | os.PathLike,
    source: str = "local",
    gguf_file: str | None = None,
    tokens: int | None = None,
    allow_pickle: bool = False,
) -> dict:
    """The manifest of a checkpoint on disk: shape, size and sha256 of every file.

    ``tokens``: seen in training until then, None where unknown. ``parameters`` of the shape counts the numbers in the
    weight files (tied embeddings once, as save_pretrained stores them), None where they are pickles. Raises
    CheckpointError on a damaged file.
    """
    paths = layout.checkpoint_files(directory, gguf_file, allow_pickle)
    if gguf_file:
        shape = _gguf_shape(paths[0])
    else:
        headers = [layout.safetensors_header(p) for p in paths if p.suffix == ".safetensors"]
        tensors = [tensor["shape"] for header in headers for tensor in header.values()]
        shape = shape_of(read_config(directory), tensors)
    return {
        "series": series,
        "step": step,
        "tokens": tokens,
        "source": source,
        "directory": str(directory),
        "gguf_file": gguf_file,
        "allow_pickle": allow_pickle,
        "shape": shape,
        "repo": None,
        "revision": None,
        "commit": None,
        "files": {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in paths},
    }


def on_hub(
    series: str, step: int | None, repo: str, revision: str, tokens: int | None = None, allow_pickle: bool = False
) -> dict:
    """The manifest of a revision of a hub repository, from its listing, its configuration and the headers of its
    weights; ``step`` None: the series is this revision alone.

    Raises HubError where the hub does not give them, CheckpointError where they are no checkpoint.
    """
    where = f"{repo} at {revision}"
    commit, listed = hub.listing(repo, revision)
    names = layout.belonging(where, listed, lambda name: hub.read(repo, commit, name, listed[name]), allow_pickle)
    for name in ("config.json", *names):
        if name not in listed:
            raise CheckpointError(f"{where}: has no {name}; the revision is damaged, leave the step out")
    config = _parsed(hub.read(repo, commit, "config.json", listed["config.json"]), f"{where}: config.json")
    headers = [hub.shapes(repo, commit, name) for name in names if name.endswith(".safetensors")]
    return {
        "series": series,
        "step": step,
        "tokens": tokens,
        "source": "hub",
        "directory": None,
        "gguf_file": None,
        "allow_pickle": allow_pickle,
        "shape": shape_of(config, [shape for header in headers for shape in header.values()]),
        "repo": repo,
        "revision": revision,
        "commit": commit,
        "files": {name: listed[name] for name in names},
    }


def hashes(entry: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """The hashes of some of the files of a manifest, by name."""
    return {name: facts.get("sha256") or facts["git_sha1"] for name, facts in entry["files"].items() if name in names}


def weights(entry: Mapping[str, Any]) -> list[str]:
    """The names of the weight files of a manifest."""
    return [name for name in entry["files"] if layout.is_weights(name)]


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a model of this configuration routes between experts."""
    return bool(_first(config, _SHAPE_KEYS["experts"]))


def read_config(directory: str | os.PathLike) -> dict:
    """The configuration of a checkpoint in Hugging Face format (the text part of a multimodal one)."""
    path = Path(directory) / "config.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); fetch the file again") from error
    return _parsed(content, str(path))


def _parsed(content: bytes, where: str) -> dict:
    try:
        config = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{where}: cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: is no configuration of a model; fetch the file again")
    return config.get("text_config") or config


def shape_of(config: Mapping[str, Any], tensors: Iterable[Iterable[int]] = ()) -> dict[str, int | None]:
    """The shape of a model from its configuration, and its parameters from the shapes of its tensors."""
    shape = {name: _first(config, keys) for name, keys in _SHAPE_KEYS.items()}
    shared = shape.pop("shared")
    if not shape["experts"]:
        shape |= {"experts": 0, "K": 0, "I": _first(config, ("intermediate_size", "n_inner", "ffn_dim"))}
    elif shared and shape["I"] and not shape["shared_I"]:
        shape["shared_I"] = shared * shape["I"]
    shape["shared_I"] = shape["shared_I"] or 0
    return shape | {"parameters": sum(map(math.prod, tensors)) or None}


def _gguf_shape(path: Path) -> dict[str, int | None]:
    from gguf import GGUFReader  # reads the whole token list: seconds, and only where a GGUF file is used

    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except Exception as error:  # the reader meets damage unprepared: IndexError, OverflowError, KeyError, ...
        raise CheckpointError(
            f"{path}: cannot be read as GGUF ({layout.reason(error)}); fetch the file again"
        ) from error
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
