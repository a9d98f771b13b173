"""What a configuration takes, before anything is downloaded: ``python -m moescope.estimate [--configfile FILE ...]``.

Checkpoints, bytes, disk, memory and hours of what is still to be done. Bytes of checkpoints are those of files,
manifests, catalogs or the hub's own listing; where none of them tells, a sum is unknown, never guessed. Results, memory
and hours are estimates from the shapes of models, by the formulas in the docstrings here; constants were measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moescope import catalog, checkpoints, config, costs, fused, hub, layout, manifests, plan, store
from moescope.costs import Machine, Prompts, Shape
from moescope.errors import MoescopeError

ROOT = config.DEFAULT.parent
#: The table by which a job of a checkpoint is known to be done.
DONE = {
    "attribute": "predictions",
    "ablate": "ablations",
    "mask_dense": "masked_groups",
    "intervene": "expert_interventions",
}
STAGES = ("download", "training", *DONE)
#: Requests to the hub at a time, and seconds to wait for its first answer.
_AT_ONCE, _PATIENCE = 4, 20.0


@dataclass(frozen=True)
class Amount:
    """A sum (bytes, hours) of parts of which some may be unknown; ``known``: that of the others."""

    known: float = 0.0
    complete: bool = True

    @classmethod
    def of(cls, value: float | None) -> Amount:
        """One part, None where it is unknown."""
        return cls(0.0, False) if value is None else cls(value)

    @classmethod
    def sum(cls, parts: Iterable[Amount]) -> Amount:
        """All parts together."""
        parts = list(parts)
        return cls(sum(part.known for part in parts), all(part.complete for part in parts))

    def text(self, shown: Callable[[float], str]) -> str:
        """The sum, ``at least`` what is known of it, or ``unknown``."""
        if self.complete:
            return shown(self.known)
        return f"at least {shown(self.known)}" if self.known else "unknown"


# Shapes and prompts ---------------------------------------------------------------------------------------------------


def shape_of(series: plan.Series, root: Path) -> Shape | None:
    """The shape of a series' models, None where their configuration does not tell it."""
    entry = series.entry
    if series.on_hub:
        return Shape.of(catalog.model(entry["repo"], root))
    if series.pretrained:
        return Shape.of({**entry["shape"], "vocab_size": entry["training"]["vocabulary"]})
    first = Path(series.files[max(series.files)][0])
    return Shape.of(_gguf_config(first) if entry["gguf_file"] else manifests.read_config(first.parent))


def _gguf_config(path: Path) -> dict:
    """The sizes of the model in a GGUF file, in the names of transformers."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        kind = reader.fields["general.architecture"].contents()
        names = {
            "num_hidden_layers": "block_count",
            "hidden_size": "embedding_length",
            "intermediate_size": "feed_forward_length",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
        }
        fields = {name: reader.fields.get(f"{kind}.{key}") for name, key in names.items()}
        vocabulary = {tensor.name: int(tensor.shape[-1]) for tensor in reader.tensors}.get("token_embd.weight")
        return {name: int(field.contents()) for name, field in fields.items() if field} | {"vocab_size": vocabulary}
    except Exception as error:  # the reader meets damage unprepared: IndexError, OverflowError, KeyError, ...
        raise MoescopeError(f"{path}: cannot be read as GGUF ({layout.reason(error)}); fetch it again") from error


@dataclass(frozen=True)
class Held:
    """A checkpoint that the store will hold: its ``size`` in bytes (None: unknown), and whether a fused copy is made of
    it beside what was fetched."""

    size: int | None
    copied: bool


def store_peak(held: Sequence[Held], keep: int) -> Amount:
    """Bytes that the store takes at its peak: ``keep`` checkpoints (or as many as there are) as large as the largest,
    and a fused copy of the largest mixture of experts while it is made."""
    sizes = [one.size or 0 for one in held]
    copies = [one.size or 0 for one in held if one.copied]
    known = min(keep, len(held)) * max(sizes, default=0) + max(copies, default=0)
    return Amount(known, all(one.size is not None for one in held))


def store_room() -> int:
    """Bytes that the store may take: what is free in its file system, and what its entries hold already (they make
    way)."""
    entries = store.folder() / "entries"
    held = sum(path.stat().st_size for path in entries.rglob("*") if path.is_file())
    return free(store.folder()) + held


def free(folder: Path) -> int:
    """Bytes that are free where a folder is, or would be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# Sizes of checkpoints -------------------------------------------------------------------------------------------------

#: A series' name and a step of it.
Key = tuple[str, plan.Step]


def sizes(asked: plan.Plan, wanted: Iterable[Key]) -> dict[Key, int | None]:
    """Bytes of checkpoints: of files on this disk, as their manifests or catalogs say, else as the hub lists them; None
    where nobody tells."""
    found: dict[Key, int | None] = {}
    for name, step in wanted:
        listed = manifest(name, step) if asked.series[name].on_hub else {}
        found[name, step] = sum(file["bytes"] for file in listed["files"].values()) if listed else None
        found[name, step] = found[name, step] or asked.series[name].size(step)
    unknown = [key for key, size in found.items() if size is None]
    revisions = [_revision(asked.series[name], step) for name, step in unknown]
    return found | dict(zip(unknown, of_hub(revisions), strict=True))


def _revision(series: plan.Series, step: plan.Step) -> tuple[str, str]:
    """The repository and the commit of a checkpoint; where the catalog does not know the commit, the name of the
    branch."""
    revision = series.revisions[step]
    return series.entry["repo"], revision.commit or revision.revision


def of_hub(revisions: Sequence[tuple[str, str]]) -> list[int | None]:
    """Bytes of the weights of revisions (repository, commit or name) as the hub lists them, one request each; None
    where it lists none, and from the first one on that it does not answer."""
    stopped = threading.Event()

    def size(revision: tuple[str, str]) -> int:
        try:
            return 0 if stopped.is_set() else hub.weights_size(*revision)
        except Exception:  # whatever it is, the size is unknown, and that is no failure
            stopped.set()
            return 0

    if not revisions or (first := _within(_PATIENCE, lambda: size(revisions[0]))) is None:
        return [None] * len(revisions)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [found or None for found in (first, *pool.map(size, revisions[1:]))]


def _within(seconds: float, call: Callable[[], int]) -> int | None:
    """What a function returns, None if not by then: it then goes on alone and ends with the process."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def manifest(name: str, step: plan.Step) -> dict:
    """The manifest of a checkpoint, empty where it is not made yet."""
    try:
        return json.loads(Path(plan.RESULTS, name, str(step), "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def in_store(name: str, step: plan.Step) -> bool:
    """Whether the store holds a checkpoint of the hub, whole."""
    entry = manifest(name, step)
    return bool(entry) and store.whole(checkpoints.key(entry))


# The estimate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What is still to be done for one series: of every job (``DONE``) the steps, and whether it ``trains``."""

    series: plan.Series
    shape: Shape | None
    jobs: dict[str, list[plan.Step]]
    trains: bool

    @classmethod
    def of(cls, asked: plan.Plan, series: plan.Series, root: Path = ROOT) -> Work:
        """Of a series of a plan, on this disk."""
        steps = {"attribute": series.steps}
        if asked.asks("dynamics"):
            steps["ablate"] = asked.ablation.get(series.name, ())
            steps["mask_dense"] = asked.dynamics[series.name] if series.name in asked.routed_by else ()
        if asked.asks("collaboration") and series.has_experts:
            steps["intervene"] = asked.collaboration.get(series.name, ())
        folder = Path(plan.RESULTS, series.name)
        left = {
            job: [step for step in steps.get(job, ()) if not (folder / str(step) / f"{table}.parquet").exists()]
            for job, table in DONE.items()
        }
        files = [path for paths in series.files.values() for path in paths]
        trains = series.pretrained and not all(Path(path).exists() for path in files)
        return cls(series, shape_of(series, root), left, trains)

    @property
    def needed(self) -> list[Key]:
        """The checkpoints that some job needs."""
        return [(self.series.name, step) for step in dict.fromkeys(s for steps in self.jobs.values() for s in steps)]

    def _named(self, asked: Mapping) -> int:
        """How many pairs of a head and an expert are named for this series."""
        return sum(pair["series"] == self.series.name for pair in asked["collaboration"]["pairs"])

    def hours(self, machine: Machine, prompts: Prompts, asked: Mapping) -> dict[str, Amount]:
        """Hours of every stage but the download that has something to do."""
        counts = {"training": int(self.trains)} | {job: len(steps) for job, steps in self.jobs.items()}
        one = {} if self.shape is None else self._each(machine, prompts, asked)
        return {
            stage: Amount(count * one[stage]) if one else Amount.of(None) for stage, count in counts.items() if count
        }

    def _each(self, machine: Machine, prompts: Prompts, asked: Mapping) -> dict[str, float]:
        """Hours of the training, and of each job of one checkpoint."""
        shape, told, ablation = self.shape, self.series.entry.get("training"), asked["ablation"]
        trained = told and machine.hours(
            costs.training(shape, told), costs.JOB + costs.UPDATE * told["steps"], alone=True
        )
        ablating = costs.JOB + costs.PASS * costs.passes(shape, ablation).total()
        experiments = shape, prompts, asked["collaboration"], self._named(asked)
        return {
            "training": trained or 0.0,
            "attribute": machine.hours(costs.attribute(shape, prompts), costs.JOB),
            "ablate": machine.hours(costs.ablate(shape, prompts, ablation), ablating),
            "mask_dense": machine.hours(costs.mask_dense(shape, prompts), costs.JOB),
            "intervene": machine.hours(costs.intervene(*experiments), costs.JOB + costs.overhead(*experiments)),
        }

    def results(self, prompts: Prompts, asked: Mapping) -> Amount:
        """Bytes that the results grow by: tables, and the checkpoints that are trained here (float32)."""
        if self.shape is None:
            return Amount.of(None if self.needed else 0)
        each = costs.tables_of(self.shape, prompts, asked, self._named(asked))
        trained = 4 * self.shape.parameters * len(self.series.files) if self.trains else 0
        return Amount(trained + sum(each[job] * len(steps) for job, steps in self.jobs.items()))

    def memory(self, prompts: int, norm: str) -> Amount:
        """Bytes of memory of a scoring job."""
        if self.shape is None:
            return Amount.of(None)
        return Amount(costs.memory_of(self.shape, prompts, norm == "local", bool(self.series.entry.get("gguf_file"))))

    def held(self, known: Mapping[Key, int | None]) -> list[Held]:
        """The checkpoints that the store will hold: those of the hub, and copies of large mixtures of experts on this
        disk that have one tensor per expert."""
        sizes, series = [known[key] for key in self.needed], self.series
        if series.on_hub:
            return [Held(size, series.has_experts and (size is None or size >= fused.LEAST)) for size in sizes]
        large = [size for size in sizes if series.has_experts and size >= fused.LEAST]
        return [Held(size, False) for size in large] if large and _in_parts(series.files[max(series.files)]) else []


def _in_parts(paths: Iterable[str]) -> bool:
    """Whether weight files hold one tensor per expert, so that they cannot be mapped."""
    headers = (layout.safetensors_header(path) for path in paths if path.endswith(".safetensors"))
    return any(re.search(r"\bexperts\.\d+\.", key) for header in headers for key in header)


@dataclass(frozen=True)
class Forecast:
    """Of one series: ``checkpoints`` selected and of these ``scored``; what is to come: bytes to ``download`` and of
    ``results``, bytes of ``memory`` of a job, ``hours`` by stage (those that do nothing are left out)."""

    name: str
    checkpoints: int
    scored: int
    download: Amount
    results: Amount
    memory: Amount
    hours: dict[str, Amount]


@dataclass(frozen=True)
class Estimate:
    """Of every series, and what the store takes at its peak (bytes)."""

    series: list[Forecast]
    store: Amount


def estimate(asked: plan.Plan, machine: Machine, root: Path = ROOT) -> Estimate:
    """What a plan takes on a machine. Raises MoescopeError where files of the user's cannot be read."""
    prompts = Prompts.of(asked.facts, root)
    works = [Work.of(asked, series, root) for series in asked.series.values()]
    known = sizes(asked, [key for work in works for key in work.needed])
    held = [one for work in works for one in work.held(known)]
    return Estimate([_forecast(work, asked, known, prompts, machine) for work in works], store_peak(held, store.keep()))


def _forecast(
    work: Work, asked: plan.Plan, known: Mapping[Key, int | None], prompts: Prompts, machine: Machine
) -> Forecast:
    series, hours = work.series, work.hours(machine, prompts, asked.config)
    fetched = [key for key in work.needed if series.on_hub and not in_store(*key)]
    download = Amount.sum(Amount.of(known[key]) for key in fetched)
    if fetched:
        hours["download"] = Amount(download.known / machine.bandwidth / 3600, download.complete)
    return Forecast(
        series.name,
        len(series.steps),
        len(series.steps) - len(work.jobs["attribute"]),
        download,
        work.results(prompts, asked.config),
        work.memory(prompts.count, asked.config["attribution"]["norm"]),
        hours,
    )


# What is printed ------------------------------------------------------------------------------------------------------


def report(found: Estimate, machine: Machine, norm: str = "final") -> str:
    """The estimate as text: two tables with a row a series, the disks, and how to read the hours."""
    counts = ("checkpoints", "scored", "to download", "results to come", "memory of a job")
    stages = [stage for stage in STAGES if any(stage in series.hours for series in found.series)]
    lines = [
        *_table(("series", *counts), [*map(_row, found.series), _total(found.series)]),
        "",
        *(_table(("hours (estimate)", *stages, "sum"), _hour_rows(found.series, stages)) if stages else ()),
        *([""] if stages else ()),
        f"store: {found.store.text(_bytes)} at its peak, {_bytes(store_room())} to be had in {store.folder()}",
        f"results: {Amount.sum(s.results for s in found.series).text(_bytes)} to come (estimate), "
        f"{_bytes(free(Path(plan.RESULTS)))} free in {plan.RESULTS}",
        f"Hours are an estimate, for the CPU of this machine ({machine.threads} threads, {machine.rate / 1e9:,.0f} "
        f"GFLOP/s just now), one job at a time; downloads at {machine.bandwidth / 1e6:,.0f} MB/s. "
        "What is done does not count.",
    ]
    if not all(series.download.complete for series in found.series):
        lines.append("Bytes are unknown where neither the catalog nor the hub tells them: make catalog lists them.")
    if norm == "local":
        lines.append("attribution.norm is local: attribute and mask_dense take longer than that.")
    return "\n".join(lines)


def shortage(found: Estimate) -> str | None:
    """One line where the disk is too small for the store, else None."""
    if (room := store_room()) >= found.store.known:
        return None
    return (
        f"the store needs {found.store.text(_bytes)} and {_bytes(room)} are to be had in {store.folder()}: make room, "
        "name another folder in MOESCOPE_STORE, or keep fewer checkpoints (MOESCOPE_KEEP)"
    )


def _row(series: Forecast) -> list[str]:
    amounts = (series.download, series.results, series.memory)
    return [series.name, f"{series.checkpoints:,}", f"{series.scored:,}", *(amount.text(_bytes) for amount in amounts)]


def _total(series: Sequence[Forecast]) -> list[str]:
    """The last row: sums, and the most memory of a job."""
    largest = Amount(max(s.memory.known for s in series), all(s.memory.complete for s in series))
    sums = [Amount.sum(getattr(s, name) for s in series) for name in ("download", "results")]
    counts = [sum(getattr(s, name) for s in series) for name in ("checkpoints", "scored")]
    return ["total", *(f"{count:,}" for count in counts), *(amount.text(_bytes) for amount in (*sums, largest))]


def _hour_rows(series: Sequence[Forecast], stages: Sequence[str]) -> list[list[str]]:
    nothing = Amount()
    rows = [(one.name, [one.hours.get(stage, nothing) for stage in stages]) for one in series]
    rows.append(("total", [Amount.sum(column) for column in zip(*(row for _, row in rows), strict=True)]))
    return [[name, *(amount.text(_hours) for amount in (*row, Amount.sum(row)))] for name, row in rows]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (heads, *rows)
    ]


def _bytes(size: float) -> str:
    return "0" if not size else f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _hours(hours: float) -> str:
    return "-" if not hours else f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 10 else f"{hours:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what a configuration takes; status 1 where it cannot be read, or where the store's disk is too small."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configfile", nargs="+", action="extend", default=[], type=Path, help="laid over config.yaml")
    parser.add_argument("--bandwidth", type=float, default=100.0, metavar="MB/S", help="of downloads (default: 100)")
    parser.add_argument("--directory", type=Path, default=Path(), help="of the run, as Snakemake takes it")
    options = parser.parse_args(arguments)
    try:
        if not options.bandwidth > 0:
            raise MoescopeError(f"--bandwidth: {options.bandwidth:g} MB/s downloads nothing; write a number above 0")
        asked = plan.read(config.read_in(options.directory, options.configfile), ROOT)
        machine = Machine.measured(1e6 * options.bandwidth)
        found = estimate(asked, machine)
        print(report(found, machine, asked.config["attribution"]["norm"]))
        if short := shortage(found):
            raise MoescopeError(short)
    except MoescopeError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of facts, which the jobs repeat, and of requests that are tried again
    main()
