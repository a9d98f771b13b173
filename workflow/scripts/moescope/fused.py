"""A copy of a checkpoint that can be mapped into memory: experts fused, as the model itself holds them.

A published mixture of experts has one tensor per expert and matrix. Loading fuses them, in memory, so that the whole
model is held there; tensors that already have the model's names are mapped from disk instead, page by page, as they are
used. The copy is made once, one tensor at a time, by transformers' own conversions.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescope import files, layout, manifests
from moescope.errors import MoescopeError

#: What a copy says of itself: size and sha256 of its own files, sha256 of those it was made from.
RECORD = "fused.json"
#: Below this size a checkpoint is loaded as it is (bytes): a copy would save nothing.
LEAST = 2**28
#: Bytes of one weight file of a copy, which is what its making holds in memory beside one tensor.
_SHARD = 2**29


class FusedError(MoescopeError):
    """A checkpoint of which no copy can be made."""


def write(place: Path, directory: Path, entry: Mapping[str, Any]) -> None:
    """Make a copy of a mixture of experts in the new folder ``place``, whole or not at all.

    ``entry``: the manifest of the checkpoint, whose files lie in ``directory``. Raises FusedError where a weight is not
    finite, and where the disk is faulty.
    """
    part = place.with_name(f"{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        _write(part, directory, _targets(directory, manifests.weights(entry)), entry)
        os.rename(part, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _sync(place.parent)


def needed(directory: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a checkpoint would gain by a copy: a large mixture of experts in safetensors that is not fused."""
    weights = manifests.weights(entry)
    if not entry["shape"]["experts"] or not all(name.endswith(".safetensors") for name in weights):
        return False
    if sum(entry["files"][name]["bytes"] for name in weights) < LEAST:
        return False
    return any(target.conversion is not None for target in _targets(directory, weights).values())


def finite(tensor: Any) -> bool:
    """Whether a tensor holds neither a NaN nor an infinity; looked at in parts, so that no large one is made of it."""
    import torch

    rows = max(1, 2**22 * len(tensor) // max(1, tensor.numel())) if tensor.dim() else 1
    return all(bool(torch.isfinite(part).all()) for part in (tensor.split(rows) if tensor.dim() else (tensor,)))


def whole(copy: Path) -> bool:
    """Whether a copy has all its files, in the sizes that they were given."""
    try:
        record = json.loads((copy / RECORD).read_text(encoding="utf-8"))
        return all((copy / name).stat().st_size == facts["bytes"] for name, facts in record["files"].items())
    except (OSError, ValueError, KeyError):
        return False


@dataclass
class _Target:
    """One tensor of the model, or several that are made together, by a conversion that holds what it takes, or as the
    one tensor of the checkpoint that it is."""

    model: Any
    conversion: Any | None
    source: _Lazy

    def tensors(self, name: str) -> Mapping[str, Any]:
        """By the model's own names; ``name`` is the first of them."""
        if self.conversion is None:
            return {name: self.source()}
        return self.conversion.convert(name, model=self.model, config=self.model.config)


@dataclass
class _Lazy:
    """A tensor of a file that is read when it is called for."""

    path: Path
    key: str

    def __call__(self) -> Any:
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.key)


def _targets(directory: Path, weights: list[str]) -> dict[str, _Target]:
    """What the model is made of, by its own name of each tensor: as transformers matches them when it loads."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    mapping, known = get_model_conversion_mapping(model), model.state_dict()
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    parts = []
    for name in weights:
        with safe_open(directory / name, "pt") as file:
            parts += [_Lazy(directory / name, key) for key in file.keys()]  # noqa: SIM118 (no dictionary)
    found: dict[str, _Target] = {}
    for part in sorted(parts, key=lambda p: dot_natural_key(p.key)):
        name, pattern = rename_source_key(part.key, renamings, converters, model.base_model_prefix, known)
        if name not in known and part.key in known:
            name, pattern = part.key, None
        conversion = copy.deepcopy(by_pattern[pattern]) if pattern else None
        target = found.setdefault(name, _Target(model, conversion, part))
        if target.conversion is not None:
            target.conversion.add_tensor(name, part.key, pattern, part)
    return found


def _tensors(targets: Mapping[str, _Target]) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of all that the model holds, one after the other."""
    for first, target in targets.items():
        made = dict(target.tensors(first))
        for name in list(made):  # none is kept here while the next one is made
            value = made.pop(name)
            yield name, value[0] if isinstance(value, list) else value
            del value


def _write(part: Path, directory: Path, targets: Mapping[str, _Target], entry: Mapping[str, Any]) -> None:
    """Put a copy into a new folder: weights, index, whatever else belongs to the checkpoint, and its record."""
    part.mkdir()
    index: dict[str, str] = {}
    held: dict[str, Any] = {}

    def flush() -> None:
        name = f"model-{len(set(index.values())):05d}.safetensors"
        _save(held, part / name)
        index.update(dict.fromkeys(held, name))
        held.clear()

    for name, tensor in _tensors(targets):
        if not finite(tensor):
            raise FusedError(f"{directory}: {name} holds a NaN or an infinity; fetch it again or leave the step out")
        held[name] = tensor.contiguous()
        del tensor  # what was written must not stay beside what is made next
        if sum(t.nbytes for t in held.values()) >= _SHARD:
            flush()
    if held:
        flush()
    files.write_json({"metadata": {}, "weight_map": index}, part / "model.safetensors.index.json")
    for name in entry["files"]:
        if not layout.is_weights(name) and not name.endswith(".index.json"):
            shutil.copyfile(directory / name, part / name)
    own = {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in sorted(part.iterdir())}
    files.write_json({"files": own, "made_from": manifests.hashes(entry, entry["files"])}, part / RECORD)
    for path in (*part.iterdir(), part):
        _sync(path)


def _save(tensors: Mapping[str, Any], path: Path) -> None:
    """Write a weight file and read it back from the disk."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    _sync(path)
    with safe_open(path, "pt") as file:
        if not all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items()):
            raise FusedError(f"{path}: is not what was written; check the disk or name another in MOESCOPE_STORE")


def _sync(path: Path) -> None:
    """Make sure that a file or the names in a folder are on the disk, and that the next read comes from there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
