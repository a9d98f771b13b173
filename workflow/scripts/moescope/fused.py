"""A copy of a checkpoint that can be mapped into memory: experts fused, as the model itself holds them.

A published mixture of experts has one tensor per expert and matrix. Loading fuses them, in memory, so that the whole
model is held there; tensors that already have the model's names are mapped from disk instead, page by page, as they are
used. The copy is made once, one tensor at a time, by transformers' own conversions.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moescope import files
from moescope.errors import MoescopeError

#: What a copy says of itself: the sha256 of its own files and of those it was made from.
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
    them that hold no weights.
    """
    weights = [name for name in sources if name not in side_files]
    if sum(sources[name]["bytes"] for name in weights) < LEAST:
        return directory
    targets = _targets(directory, weights)
    if all(source_pattern is None for _, source_pattern, _ in targets.values()):
        return directory
    place = store() / "fused" / _digest(sources)
    if not _whole(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix="part-", ignore_cleanup_errors=True) as part:
            _write(Path(part), directory, targets, sources, side_files)
            try:
                os.rename(part, place)
            except OSError:  # another process was faster, or an incomplete copy stands there
                if not _whole(place):
                    shutil.rmtree(place)
                    os.rename(part, place)
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


def _targets(directory: Path, weights: list[str]) -> dict[str, tuple[Any, str | None, list[tuple[str, str]]]]:
    """By the model's own name of a tensor: the conversion that makes it, the pattern it matched (None: a plain tensor)
    and what it is made from, (file, key) in the order of the experts."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, local_files_only=True))
    mapping, known = get_model_conversion_mapping(model), model.state_dict()
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    keys = []
    for name in weights:
        with safe_open(directory / name, "pt") as file:
            keys += [(key, name) for key in file.keys()]  # noqa: SIM118 (no dictionary)
    found: dict[str, tuple[Any, str | None, list[tuple[str, str]]]] = {}
    for key, name in sorted(keys, key=lambda pair: dot_natural_key(pair[0])):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if target not in known and key in known:
            target, pattern = key, None
        made_by = copy.deepcopy(by_pattern[pattern]) if pattern else None
        conversion, _, parts = found.setdefault(target, (made_by, pattern, []))
        parts.append((name, key))
        if conversion is not None:
            conversion.add_tensor(target, key, pattern, _Lazy(directory / name, key))
    return found


class _Lazy:
    """A tensor of a file that is read when it is called for."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def __call__(self) -> Any:
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.key)


def _tensors(directory: Path, targets: Mapping[str, tuple]) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of all that the model holds, one after the other."""
    for target, (conversion, _, parts) in targets.items():
        if conversion is None:
            ((name, key),) = parts
            yield target, _Lazy(directory / name, key)()
        else:
            made = conversion.convert(target)
            yield from ((key, value[0] if isinstance(value, list) else value) for key, value in made.items())


def _write(part: Path, directory: Path, targets: Mapping[str, tuple], sources: Mapping, side_files: list[str]) -> None:
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    held: dict[str, Any] = {}

    def flush() -> None:
        name = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(held, part / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(held, name))
        held.clear()

    for name, tensor in _tensors(directory, targets):
        if not finite(tensor):
            raise FusedError(f"{directory}: {name} holds a NaN or an infinity; fetch it again or leave the step out")
        held[name] = tensor.contiguous()
        if sum(t.nbytes for t in held.values()) >= _SHARD:
            flush()
    if held:
        flush()
    (part / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for name in side_files:
        if not name.endswith(".index.json"):
            shutil.copy2(directory / name, part / name)
    made = [p for p in part.iterdir() if p.name != RECORD]
    own = {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in sorted(made)}
    files.write_json({"files": own, "made_from": {n: f["sha256"] for n, f in sources.items()}}, part / RECORD)
