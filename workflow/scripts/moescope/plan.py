"""What a configuration comes to on this disk: which checkpoints, made of which files, asked about which facts.

Read while the Snakefile is parsed, so it imports no torch and refuses, before any job starts, what cannot succeed.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moescope import checkpoints, config, facts, pretraining
from moescope.errors import MoescopeError

RESULTS = "results"


class PlanError(MoescopeError):
    """The configuration is well formed, but this disk does not hold what it names."""


@dataclass(frozen=True)
class Series:
    """A series of checkpoints: its configuration, the files of every step that there is, the selected steps."""

    name: str
    entry: dict
    architecture: str
    has_experts: bool
    files: dict[int, tuple[str, ...]]
    steps: tuple[int, ...] = ()

    @property
    def pretrained(self) -> bool:
        return self.entry["source"] == "pretrain"

    def size(self, step: int) -> int:
        """Bytes of a checkpoint's files on disk; 0 while they are not made."""
        return sum(Path(path).stat().st_size for path in self.files[step] if os.path.exists(path))

    @property
    def kind(self) -> str:
        """``moe`` or ``dense``: which tables its checkpoints have."""
        return "moe" if self.has_experts else "dense"


@dataclass(frozen=True)
class Plan:
    """The effective configuration, its series by name, its facts; and for study ``dynamics`` the steps of the series
    that take part, those that are ablated, and the mixture of experts that each dense series is held against."""

    config: dict
    series: dict[str, Series]
    facts: facts.Facts
    dynamics: dict[str, tuple[int, ...]]
    ablation: dict[str, tuple[int, ...]]
    routed_by: dict[str, str]

    def of_kind(self, kind: str) -> list[str]:
        """Names of the series with (``moe``) or without (``dense``) experts."""
        return [series.name for series in self.series.values() if series.kind == kind]

    def asks(self, study: str) -> bool:
        """Whether the configuration names the study."""
        return study in self.config["studies"]

    def matched_step(self, dense: str, step: int) -> int:
        """The checkpoint of the paired mixture of experts nearest to a step of a dense series, ties to the earlier."""
        return checkpoints.select_steps(dense, self.dynamics[self.routed_by[dense]], {"nearest": [step]})[0]


def read(raw: dict, root: str | os.PathLike) -> Plan:
    """The plan of a configuration; ``root`` is the folder of the Snakefile, the working directory holds the rest.

    Raises MoescopeError, one line, on anything that no job could put right.
    """
    effective = config.effective(raw)
    asked = facts.choose(effective["relations"], root)
    series = {entry["name"]: _series(i, entry) for i, entry in enumerate(effective["series"])}
    _check_writable(Path(RESULTS))
    dynamics = _members(effective, "dynamics", {name: one.steps for name, one in series.items()}, series)
    ablation = _members(effective, "ablation", dynamics, series)
    return Plan(effective, series, asked, dynamics, ablation, _pairs(effective, dynamics, series))


def _members(
    effective: dict, part: str, steps: dict[str, tuple[int, ...]], series: dict[str, Series]
) -> dict[str, tuple[int, ...]]:
    """The series that take part in a study (or in the ablation), and at which of the given steps."""
    chosen, asked = effective[part]["series"], effective[part]["steps"]
    if chosen != "all" and (absent := [name for name in chosen if name not in steps]):
        raise PlanError(f"{part}.series: series {absent[0]} takes no part in study dynamics; drop it or add it there")
    members = {}
    for name, available in steps.items():
        own = None if part == "ablation" else series[name].entry["studies"]
        if own is not None and part in own:
            members[name] = tuple(checkpoints.select_steps(f"{name}: studies.{part}", available, own[part]))
        elif own is None and (chosen == "all" or name in chosen):
            members[name] = tuple(checkpoints.select_steps(f"{part}.steps ({name})", available, asked))
    return members


def _pairs(effective: dict, dynamics: dict[str, tuple[int, ...]], series: dict[str, Series]) -> dict[str, str]:
    """The mixture of experts that each dense series of study dynamics is held against."""
    pairs, groups = effective["dynamics"]["pairs"], effective["attribution"]["uncertainty"] == "groups"
    if pairs == "auto":
        first = {kind: next((n for n in dynamics if series[n].kind == kind), None) for kind in ("moe", "dense")}
        return {first["dense"]: first["moe"]} if groups and all(first.values()) else {}
    if pairs and not groups:
        raise PlanError("dynamics.pairs: needs the group tables; set attribution.uncertainty to groups, or pairs to []")
    for i, pair in enumerate(pairs):
        for kind, name in pair.items():
            place = f"dynamics.pairs[{i}].{kind}"
            if name not in dynamics:
                raise PlanError(f"{place}: series {name} takes no part in study dynamics; add it or drop the pair")
            if series[name].kind != kind:
                wrong = "has no experts" if kind == "moe" else "has experts"
                raise PlanError(f"{place}: series {name} {wrong}; name another series")
    return {pair["dense"]: pair["moe"] for pair in pairs}


def _series(i: int, entry: dict) -> Series:
    """The i-th series of the configuration."""
    place = f"series[{i}] ({entry['name']})"
    try:
        series = _pretrained(entry) if entry["source"] == "pretrain" else _local(entry)
    except MoescopeError as error:
        raise PlanError(f"{place}: {error}") from None
    steps = checkpoints.select_steps(place, series.files, entry["steps"])
    return dataclasses.replace(series, steps=tuple(steps))


def _pretrained(entry: dict) -> Series:
    training = dataclasses.asdict(pretraining.Training.of(entry["training"]))
    entry["training"] = {**training, "save_at": list(training["save_at"])}
    folder = f"{RESULTS}/{entry['name']}/checkpoints"
    found = {
        step: tuple(f"{folder}/{step}/{file}" for file in pretraining.CHECKPOINT_FILES) for step in training["save_at"]
    }
    return Series(entry["name"], entry, entry["architecture"], "num_experts" in entry["shape"], found)


def _local(entry: dict) -> Series:
    gguf_file = entry["gguf_file"]
    directories = checkpoints.on_disk(entry["path"], gguf_file)
    found = {
        step: tuple(map(str, checkpoints.checkpoint_files(directory, gguf_file)))
        for step, directory in directories.items()
    }
    if gguf_file:  # only models of the llama family, which have no experts, are read from GGUF
        return Series(entry["name"], entry, "llama", False, found)
    config = checkpoints.read_config(directories[max(directories)])
    architecture = config.get("model_type", "unknown")
    return Series(entry["name"], entry, architecture, checkpoints.has_experts(config), found)


def _check_writable(folder: Path) -> None:
    """Raises PlanError unless files can be made in the folder, or in the one it would be made in; leaves nothing."""
    while not os.path.lexists(folder):
        folder = folder.absolute().parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PlanError(f"{folder}: cannot be written ({error.strerror}); make it a writable folder") from None
