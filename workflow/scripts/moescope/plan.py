"""What a configuration comes to on this disk: which checkpoints, made of which files, asked about which facts.

Read while the Snakefile is parsed, so it imports no torch and refuses, before any job starts, what cannot succeed.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moescope import catalog, config, facts, layout, manifests, pretraining, steps
from moescope.errors import MoescopeError

RESULTS = "results"


class PlanError(MoescopeError):
    """The configuration is well formed, but this disk does not hold what it names."""


#: The step of a series that is a single revision.
MAIN = "main"
Step = int | str


@dataclass(frozen=True)
class Series:
    """A series of checkpoints: its configuration, the files of every step that there is (of the hub's: none on this
    disk), the selected steps; of the hub's also the branch of every step. ``kind`` is ``moe`` or ``dense``: which
    tables its checkpoints have. ``shape``: what the model's configuration says of its sizes (of GGUF: nothing)."""

    name: str
    entry: dict
    architecture: str
    kind: str
    shape: dict
    files: dict[Step, tuple[str, ...]]
    revisions: dict[Step, catalog.Revision] = dataclasses.field(default_factory=dict)
    steps: tuple[Step, ...] = ()

    @property
    def pretrained(self) -> bool:
        return self.entry["source"] == "pretrain"

    @property
    def on_hub(self) -> bool:
        return self.entry["source"] == "hub"

    @property
    def has_experts(self) -> bool:
        return self.kind == "moe"

    @property
    def has_shared(self) -> bool:
        """Whether a shared expert stands beside the routed ones."""
        return self.has_experts and bool(self.shape["shared_I"])

    def size(self, step: Step) -> int | None:
        """Bytes of a checkpoint's files: 0 while they are not made, None where the catalog does not say."""
        if self.on_hub:
            return self.revisions[step].bytes
        return sum(Path(path).stat().st_size for path in self.files[step] if os.path.exists(path))


@dataclass(frozen=True)
class Plan:
    """The effective configuration, its series by name, its facts; for study ``dynamics`` the steps of the series that
    take part, those that are ablated, and the mixture of experts that each dense series is held against; for study
    ``collaboration`` the steps of the series that take part."""

    config: dict
    series: dict[str, Series]
    facts: facts.Facts
    dynamics: dict[str, tuple[Step, ...]]
    ablation: dict[str, tuple[Step, ...]]
    routed_by: dict[str, str]
    collaboration: dict[str, tuple[Step, ...]]

    def of_kind(self, kind: str) -> list[str]:
        """Names of the series with (``moe``) or without (``dense``) experts."""
        return [series.name for series in self.series.values() if series.kind == kind]

    def asks(self, study: str) -> bool:
        """Whether the configuration names the study."""
        return study in self.config["studies"]

    def matched_step(self, dense: str, step: int) -> int:
        """The checkpoint of the paired mixture of experts nearest to a step of a dense series, ties to the earlier."""
        return steps.select(dense, self.dynamics[self.routed_by[dense]], {"nearest": [step]})[0]


def read(raw: dict, root: str | os.PathLike) -> Plan:
    """The plan of a configuration; ``root`` is the folder of the Snakefile, the working directory holds the rest.

    Raises MoescopeError, one line, on anything that no job could put right.
    """
    effective = config.effective(raw)
    asked = facts.choose(effective["relations"], root)
    series = {entry["name"]: _series(i, entry, root) for i, entry in enumerate(effective["series"])}
    _check_writable(Path(RESULTS))
    courses = {name: one.steps for name, one in series.items() if one.steps != (MAIN,)}
    dynamics = _members(effective, "dynamics", courses, series)
    ablation = _members(effective, "ablation", dynamics, series)
    collaboration = _members(effective, "collaboration", {name: one.steps for name, one in series.items()}, series)
    if "collaboration" in effective["studies"]:
        _check_experiments(effective["collaboration"], {name: series[name] for name in collaboration})
    pairs = _pairs(effective, dynamics, series)
    return Plan(effective, series, asked, dynamics, ablation, pairs, collaboration)


def _members(
    effective: dict, part: str, among: dict[str, tuple[Step, ...]], series: dict[str, Series]
) -> dict[str, tuple[Step, ...]]:
    """The series that take part in a study (or in the ablation), and at which of the given steps."""
    chosen, asked = effective[part]["series"], effective[part]["steps"]
    if chosen != "all" and (absent := [name for name in chosen if name not in among]):
        raise PlanError(f"{part}.series: series {absent[0]} takes no part in study dynamics; drop it or add it there")
    members = {}
    for name, available in among.items():
        own, paper = None if part == "ablation" else series[name].entry["studies"], _paper(series[name].entry)
        if available == (MAIN,):  # a single revision, which no choice of steps can name
            members |= {name: available} if (chosen == "all" or name in chosen) and (own is None or part in own) else {}
            continue
        if own is not None and part in own:
            members[name] = tuple(steps.select(f"{name}: studies.{part}", available, own[part], paper))
        elif own is None and (chosen == "all" or name in chosen):
            members[name] = tuple(steps.select(f"{part}.steps ({name})", available, asked, paper))
    return members


def _check_experiments(asked: Mapping, series: Mapping[str, Series]) -> None:
    """Budgets, pairs and stages that a model of these sizes cannot have."""
    for name, one in series.items():
        slots, layers = one.shape.get("K"), one.shape.get("layers")
        for mode, sizes in asked["budgets"].items() if slots else ():
            if sizes != "all" and (above := [n for n in sizes if n > slots]):
                problem = f"{above[0]} is above the {slots} experts that {name} routes a token to"
                raise PlanError(f"collaboration.budgets.{mode}: {problem}; ask for no more")
        if layers and name in asked["stages"] and asked["stages"][name][1] >= layers:
            raise PlanError(f"collaboration.stages.{name}: it has {layers} layers, counted from 0; name earlier ones")
    for i, pair in enumerate(asked["pairs"]):
        _check_pair(f"collaboration.pairs[{i}]", pair, series)


def _check_pair(place: str, pair: Mapping, series: Mapping[str, Series]) -> None:
    name = pair["series"]
    if name not in series:
        raise PlanError(f"{place}.series: series {name} takes no part in the study; add it or drop the pair")
    if not series[name].has_experts:
        raise PlanError(f"{place}.series: series {name} has no experts; name another series")
    shape = series[name].shape
    for key, units in (("head", "heads"), ("expert", "experts")):
        for number, what in zip(pair[key], ("layers", units), strict=True):
            if shape[what] and number >= shape[what]:
                raise PlanError(
                    f"{place}.{key}: {number} is beyond the {shape[what]} {what} of {name}; they count from 0"
                )


def _paper(entry: dict) -> Sequence[int]:
    """The steps that a paper reports of the repository that a series comes from."""
    return catalog.PAPER.get(entry.get("repo"), ())


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


def _series(i: int, entry: dict, root: str | os.PathLike) -> Series:
    """The i-th series of the configuration."""
    place = f"series[{i}] ({entry['name']})"
    try:
        match entry["source"]:
            case "pretrain":
                series = _pretrained(entry)
            case "local":
                series = _local(entry)
            case "hub":
                series = _hub(entry, root)
    except MoescopeError as error:
        raise PlanError(f"{place}: {error}") from None
    if entry["source"] == "hub" and entry["revision"]:
        return dataclasses.replace(series, steps=(MAIN,))
    return dataclasses.replace(series, steps=tuple(steps.select(place, series.files, entry["steps"], _paper(entry))))


def _pretrained(entry: dict) -> Series:
    training = dataclasses.asdict(pretraining.Training.of(entry["training"]))
    entry["training"] = {**training, "save_at": list(training["save_at"])}
    folder = f"{RESULTS}/{entry['name']}/checkpoints"
    found = {
        step: tuple(f"{folder}/{step}/{file}" for file in pretraining.CHECKPOINT_FILES) for step in training["save_at"]
    }
    return Series(entry["name"], entry, entry["architecture"], *_build(entry["shape"]), found)


def _local(entry: dict) -> Series:
    gguf_file, allow_pickle = entry["gguf_file"], entry["allow_pickle"]
    directories = layout.on_disk(entry["path"], gguf_file, allow_pickle)
    found = {
        step: tuple(map(str, layout.checkpoint_files(directory, gguf_file, allow_pickle)))
        for step, directory in directories.items()
    }
    if gguf_file:  # only models of the llama family, which have no experts, are read from GGUF
        return Series(entry["name"], entry, "llama", "dense", {}, found)
    model = manifests.read_config(directories[max(directories)])
    return Series(entry["name"], entry, model.get("model_type", "unknown"), *_build(model), found)


def _hub(entry: dict, root: str | os.PathLike) -> Series:
    model = catalog.model(entry["repo"], root)
    if entry["revision"]:
        revisions = {MAIN: catalog.single(entry["repo"], entry["revision"], root)}
    else:
        revisions = catalog.series(entry["repo"], root, entry["stage"], entry["pattern"])
    return Series(
        entry["name"],
        entry,
        model.get("model_type", "unknown"),
        *_build(model),
        dict.fromkeys(revisions, ()),
        revisions,
    )


def _build(model: Mapping) -> tuple[str, dict]:
    """Kind and shape of a model, from its configuration in the names of transformers."""
    return "moe" if manifests.has_experts(model) else "dense", manifests.shape_of(model)


def _check_writable(folder: Path) -> None:
    """Raises PlanError unless files can be made in the folder, or in the one it would be made in; leaves nothing."""
    while not os.path.lexists(folder):
        folder = folder.absolute().parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PlanError(f"{folder}: cannot be written ({error.strerror}); make it a writable folder") from None
