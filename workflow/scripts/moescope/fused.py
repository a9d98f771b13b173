"""A copy of a checkpoint that can be mapped into memory: experts fused, as the model itself holds them.

A published mixture of experts has one tensor per expert and matrix. Loading fuses them, in memory, so that the whole
model is held there; tensors that already have the model's names are mapped from disk instead, page by page, as they are
used. The copy is made once, one tensor at a time, by transformers' own conversions.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescope import files
from moescope.errors import MoescopeError

#: What a copy says of itself: size and sha256 of its own files, sha256 of those it was made from.
RECORD = "fused.json"
#: Below this size a checkpoint is loaded as it is (bytes): a copy would save nothing.
LEAST = 2**28
#: Bytes of one weight file of a copy, which is what its making holds in memory beside one tensor.
_SHARD = 2**29


class FusedError(MoescopeError):
    """A checkpoint of which no copy can be made."""


def store() -> Path:
    """The folder of copies: ``MOESCOPE_STORE``, by default in the user's cache."""
    return Path(os.environ.get("MOESCOPE_STORE") or Path.home() / ".cache" / "moescope").expanduser()


def mappable(directory: Path, sources: Mapping[str, Mapping[str, Any]], side_files: list[str]) -> Path:
    """The directory to load a mixture of experts from: its own, or a fused copy in the store, which is made if need be.

    ``sources``: bytes and sha256 of the files of the checkpoint by name, as in its manifest; ``side_files``: those of
    them that hold no weights. Raises FusedError where a file is not the one of the manifest, where a weight is not
    finite, and where the disk is full or faulty.
    """
    weights = [name for name in sources if name not in side_files]
    size = sum(sources[name]["bytes"] for name in weights)
    if size < LEAST:
        return directory
    place = store() / "fused" / _digest(sources)
    if _whole(place):
        return place
    targets = _targets(directory, weights)
    if all(target.conversion is None for target in targets.values()):
        return directory
    _verify(directory, sources)
    place.parent.mkdir(parents=True, exist_ok=True)
    _require_room(place.parent, size)
    part = place.parent / f"part-{uuid.uuid4().hex}"  # of this job alone, on whatever machine it runs
    try:
        _write(part, directory, targets, sources, side_files)
        _move(part, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return place


def finite(tensor: Any) -> bool:
    """Whether a tensor holds neither a NaN nor an infinity; looked at in parts, so that no large one is made of it."""
    import torch

    rows = max(1, 2**22 * len(tensor) // max(1, tensor.numel())) if tensor.dim() else 1
    return all(bool(torch.isfinite(part).all()) for part in (tensor.split(rows) if tensor.dim() else (tensor,)))


def checked(directory: Path) -> bool:
    """Whether a directory is a copy whose weights were found finite when it was made."""
    return (directory / RECORD).is_file()


def _digest(sources: Mapping[str, Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps({n: f["sha256"] for n, f in sorted(sources.items())}).encode()).hexdigest()[:32]


def _whole(place: Path) -> bool:
    """Whether a copy stands there with files of the sizes that it was given."""
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        return all((place / name).stat().st_size == facts["bytes"] for name, facts in record["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _verify(directory: Path, sources: Mapping[str, Mapping[str, Any]]) -> None:
    """A training run may have written new weights of the same sizes since the manifest was made: a copy of them would
    stand under the name of the old ones for good."""
    for name, facts in sources.items():
        if files.sha256(directory / name) != facts["sha256"]:
            raise FusedError(f"{directory / name}: is not the file of the manifest any more; run the workflow again")


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise FusedError(
            f"{folder}: a copy of the weights takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "make room or name another folder in MOESCOPE_STORE"
        )


def _move(part: Path, place: Path) -> None:
    """Give a copy its name, unless another job was faster; an incomplete one that has the name makes way."""
    try:
        os.rename(part, place)
    except OSError:
        if _whole(place):
            return
        aside = part.with_name(f"{part.name}-old")
        with contextlib.suppress(FileNotFoundError):  # another job moved it
            os.rename(place, aside)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            os.rename(part, place)
        except OSError:
            if not _whole(place):
                raise
    _sync(place.parent)


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


def _write(
    part: Path, directory: Path, targets: Mapping[str, _Target], sources: Mapping, side_files: list[str]
) -> None:
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
    for name in side_files:
        if not name.endswith(".index.json"):
            shutil.copyfile(directory / name, part / name)
    own = {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in sorted(part.iterdir())}
    files.write_json({"files": own, "made_from": {n: f["sha256"] for n, f in sources.items()}}, part / RECORD)
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
