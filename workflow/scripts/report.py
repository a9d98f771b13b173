"""Figures, summaries and provenance of all series -> one HTML page."""

import json
from pathlib import Path

from moescope import report, tables
from moescope.job import job


def section(name, source, architecture, steps, figures):
    """What the page says of one series."""
    results, summary = Path("results", name), Path("results", "attribution", name)
    manifest = json.loads((results / f"{steps[-1]}" / "manifest.json").read_text())
    scored = [results / f"{step}" / "provenance" / "attribute.json" for step in steps]
    drawn = {figure: Path("results", "figures", "attribution", name, f"{figure}.png") for figure in figures}
    return report.Series(
        name=name,
        source=source,
        architecture=architecture,
        steps=steps,
        manifest=manifest,
        provenance=[json.loads(path.read_text()) for path in scored],
        predictions=tables.read(results / f"{steps[-1]}" / "predictions.parquet"),
        accuracy=tables.read(summary / "accuracy.parquet"),
        layer_importance=tables.read(summary / "layer_importance.parquet"),
        figures={figure: path.read_bytes() for figure, path in drawn.items()},
    )


with job(snakemake):
    sections = [section(**series) for series in snakemake.params.cfg]
    template = Path(__file__).parents[1] / "report"
    report.write(report.build(sections, template), snakemake.output[0])
