"""The report: one HTML file that holds its figures and needs neither network nor scripts.

The page is the template ``report.html.j2``; what each figure shows, how it was computed and what to beware of stands in
one caption file per figure, ``<figure>.rst``, beside it.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import polars as pl
from docutils.core import publish_parts
from docutils.writers.html5_polyglot import Writer
from markupsafe import Markup

import moescope
from moescope import files
from moescope.errors import MoescopeError

#: Figures in the order of the page, and their headings.
FIGURES = {
    "accuracy": "Knowledge of the facts",
    "layer_importance": "Mean layer importance",
    "layer_profiles": "Layer profiles",
    "top_experts": "Top experts by relation",
}
#: Rows of the table of what was run.
FACTS = {
    "source": "source",
    "architecture": "architecture",
    "shape": "shape",
    "parameters": "parameters",
    "checkpoints": "checkpoints",
    "steps": "span",
    "tokens at the last step": "tokens",
    "commit of the last step": "commit",
    "weights stored as": "dtype",
    "device": "device",
    "largest decomposition error": "error",
    "attribution, all checkpoints": "seconds",
    "peak memory": "memory",
    "versions": "versions",
}
SUBSETS = {"all": "all", "seen": "seen", "held_out": "held out"}
UNKNOWN = "\N{EN DASH}"
METRICS = {"hit@10": "HIT@10", "mrr": "MRR"}
_CAPTION_SETTINGS = {"_disable_config": True, "file_insertion_enabled": False, "raw_enabled": False, "halt_level": 2}


class ReportError(MoescopeError):
    """Something the report needs is missing."""


@dataclass(frozen=True)
class Series:
    """What the report says of one series: its identity, its last checkpoint, its summary tables and figures.

    ``provenance`` holds the contents of ``provenance/attribute.json`` of every step, in the order of ``steps``;
    ``manifest`` and ``predictions`` are those of the last step, ``audit`` what its manifests say of one another.
    ``figures`` are PNG bytes by the name of the figure.
    """

    name: str
    source: str
    architecture: str
    steps: Sequence[int | None]
    manifest: Mapping
    provenance: Sequence[Mapping]
    predictions: pl.DataFrame
    accuracy: pl.DataFrame
    layer_importance: pl.DataFrame
    figures: Mapping[str, bytes]
    audit: Mapping

    @property
    def dense(self) -> bool:
        return not self.manifest.get("shape", {}).get("experts")


@dataclass(frozen=True)
class Table:
    """A table of a study as text: ``rows`` of cells below the names of the ``columns``, the first ``words`` of which
    hold words, the others numbers."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    words: int = 1


@dataclass(frozen=True)
class Drawing:
    """A figure of a study: PNG bytes by the name of what each shows, and a line for each that there is none of.

    Its caption stands in the file ``<name>.rst``.
    """

    name: str
    heading: str
    images: Mapping[str, bytes]
    missing: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """What the report says of a study: sentences to read first, tables, figures."""

    name: str
    title: str
    notes: Sequence[str]
    tables: Sequence[Table]
    figures: Sequence[Drawing]


def number(value: float | None) -> str:
    """A number in a table, a dash where there is none."""
    return UNKNOWN if value is None else f"{value:.3f}"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """A number with its interval, where there is one."""
    return number(value) if value is None or low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def build(series: Sequence[Series], folder: str | os.PathLike, studies: Sequence[Study] = ()) -> str:
    """The page, from the template and the captions in ``folder``.

    Raises ReportError for no series, and for a series that lacks a figure it should have (a dense one has no experts).
    """
    if not series:
        raise ReportError("there is no series to report; name at least one in config.yaml")
    loader = jinja2.FileSystemLoader(folder)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        series=[_section(one) for one in series],
        trained=[one.name for one in series if one.source == "pretrain"],
        read=[one.name for one in series if one.source == "local"],
        fetched=[(one.name, one.manifest["repo"]) for one in series if one.source == "hub"],
        warnings=[(one.name, line) for one in series for line in _warnings(one)],
        facts=list(FACTS.items()),
        metrics=list(METRICS.values()),
        figures=[
            {"name": name, "heading": heading, "missing": _missing(name, series), "caption": _caption(folder, name)}
            for name, heading in FIGURES.items()
        ],
        studies=[_study(folder, study) for study in studies],
        version=moescope.__version__,
    )


def write(page: str, path: str | os.PathLike) -> None:
    """Put the page there whole."""
    with files.atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _caption(folder: str | os.PathLike, name: str) -> Markup:
    text = (Path(folder) / f"{name}.rst").read_text(encoding="utf-8")
    return Markup(publish_parts(text, writer=Writer(), settings_overrides=_CAPTION_SETTINGS)["body"])


def _study(folder: str | os.PathLike, study: Study) -> dict:
    figures = [
        {
            "name": figure.name,
            "heading": figure.heading,
            "images": {name: _embedded(png) for name, png in figure.images.items()},
            "missing": figure.missing,
            "caption": _caption(folder, figure.name),
        }
        for figure in study.figures
    ]
    return {**vars(study), "figures": figures}


def _embedded(png: bytes) -> str:
    """An image as part of the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _missing(figure: str, series: Sequence[Series]) -> list[str]:
    """One line for every series without the figure."""
    lines = []
    for one in series:
        if figure in one.figures:
            continue
        if figure != "top_experts" or not one.dense:
            raise ReportError(f"{one.name}: figure {figure} is missing; run `snakemake attribution` first")
        lines.append(f"{one.name} is dense: it has no experts, hence no such figure.")
    return lines


def _warnings(series: Series) -> list[str]:
    """What a reader has to know of a series before any of its numbers."""
    gaps = [f"{earlier:,} to {later:,}" for earlier, later in series.audit["gaps"]]
    shown = ", ".join(gaps[:5]) + (f" and {len(gaps) - 5} more" if len(gaps) > 5 else "")
    lines = [f"the series has gaps: there is nothing between steps {shown}."] if gaps else []
    groups: dict[str, list[str]] = {}
    for one in series.provenance:
        if "checkpoint" in one:
            groups.setdefault(one["checkpoint"]["fingerprint"], []).append(one["checkpoint"]["step"])
    for steps in (steps for steps in groups.values() if len(steps) > 1):
        line = f"steps {' and '.join(steps)} have the same weights, so at least one is not what its name says"
        lines.append(f"{line}; every result that compares them is an artefact.")
    return [*lines, *series.audit["remarks"]]


def _section(series: Series) -> dict:
    """Everything the template prints of a series, as text and numbers."""
    shape, last = series.manifest.get("shape", {}), series.provenance[-1]
    errors = [p["decomposition_error"] for p in series.provenance if p.get("decomposition_error") is not None]
    memory = [p["peak_memory_bytes"] for p in series.provenance if p.get("peak_memory_bytes")]
    return {
        "name": series.name,
        "source": series.source,
        "architecture": series.architecture,
        "shape": _shape(shape),
        "parameters": _count(shape.get("parameters")),
        "checkpoints": len(series.steps),
        "span": _span(series.steps),
        "last": _step(series.steps[-1]),
        "tokens": _count(series.manifest.get("tokens")),
        "commit": (series.manifest.get("commit") or UNKNOWN)[:12],
        "dtype": last.get("dtype") or UNKNOWN,
        "device": last.get("device") or UNKNOWN,
        "error": f"{max(errors):.1e}" if errors else UNKNOWN,
        "seconds": _seconds(sum(p.get("seconds") or 0 for p in series.provenance)),
        "memory": f"{max(memory) / 1e9:.2f} GB" if memory else UNKNOWN,
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(last.get("versions", {}).items()))
        or UNKNOWN,
        "provenance": json.dumps(last, indent=1, ensure_ascii=False, sort_keys=True),
        "files": [
            {"name": name, "bytes": _count(file["bytes"]), "hash": file.get("sha256") or f"{file['git_sha1']} (git)"}
            for name, file in sorted(series.manifest.get("files", {}).items())
        ],
        "subsets": [label for subset, label in SUBSETS.items() if subset in series.accuracy["subset"]],
        "accuracy": _accuracy(series),
        "gain": _gain(series),
        "figures": {name: _embedded(png) for name, png in series.figures.items()},
    }


def _accuracy(series: Series) -> list[dict]:
    """Rows of the accuracy table: everything, micro and macro, with and without flags, then categories, relations."""
    table = _at(series.accuracy, series.steps[-1])
    rows = [
        _row(table, "all", None, "micro", "all, micro average", "strong"),
        _row(table, "all", None, "macro", "all, macro average", "strong"),
        _row(table, "all", None, "micro", "not flagged, micro", "", subset="unflagged"),
        _row(table, "all", None, "micro", "flagged, micro", "", subset="flagged"),
    ]
    for scope in ("category", "relation"):
        names = table.filter(pl.col("scope") == scope)["name"].unique().sort()
        rows += [_row(table, scope, name, "micro", name, "start" if not i else "") for i, name in enumerate(names)]
    return [row for row in rows if row]


def _row(
    table: pl.DataFrame, scope: str, name: str | None, average: str, label: str, look: str, subset: str = "all"
) -> dict | None:
    """One line of cells (metric by subset); of flagged and unflagged prompts only the column ``all`` is known."""
    here = table.filter(pl.col("scope") == scope, pl.col("name").eq_missing(name), pl.col("average") == average)
    columns = [s for s in SUBSETS if s in table["subset"]]
    wanted = columns if subset == "all" else [subset, *([None] * (len(columns) - 1))]
    found = {(row["subset"], row["metric"]): row for row in here.iter_rows(named=True)}
    if (subset, "mrr") not in found:
        return None
    cells = [found.get((column, metric)) for metric in METRICS for column in wanted]
    return {"label": label, "look": look, "prompts": _count(found[subset, "mrr"]["prompts"]), "cells": cells}


def _gain(series: Series) -> dict:
    """Total gains of the last step, and what they must sum to: the mean of log p_L - log p_0 over prompts."""
    total = _at(series.layer_importance, series.steps[-1]).filter(pl.col("aggregate") == "total")
    gain = {row["component"]: row for row in total.iter_rows(named=True)}
    summed = gain["ffn"]["value"] + gain["attn"]["value"]
    difference = pl.col("log_prob").cast(pl.Float64) - pl.col("log_prob_h0").cast(pl.Float64)
    share = f"{gain['ffn']['value'] / summed:.1%}" if min(gain["ffn"]["value"], gain["attn"]["value"]) > 0 else UNKNOWN
    return {**gain, "sum": summed, "expected": series.predictions.select(difference).mean().item(), "share": share}


def _at(table: pl.DataFrame, step: int | None) -> pl.DataFrame:
    return table.filter(pl.col("step").eq_missing(pl.lit(step, dtype=pl.Int64)))


def _shape(shape: Mapping) -> str:
    parts = [
        f"{shape[key]} {word}"
        for key, word in (("layers", "layers"), ("d", "wide"), ("heads", "heads"))
        if shape.get(key)
    ]
    if shape.get("experts"):
        parts.append(f"{shape['experts']} experts of {shape.get('I')}, top {shape.get('K')}")
        if shape.get("shared_I"):
            parts.append(f"shared {shape['shared_I']}")
    elif shape.get("I"):
        parts.append(f"FFN {shape['I']}")
    return ", ".join(parts) or UNKNOWN


def _count(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"


def _step(step: int | None) -> str:
    return "main" if step is None else f"step {step:,}"


def _span(steps: Sequence[int | None]) -> str:
    ends = [_step(step).removeprefix("step ") for step in (steps[0], steps[-1])]
    return ends[0] if len(steps) == 1 else f"{ends[0]} to {ends[1]}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
