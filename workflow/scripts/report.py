"""Figures, summaries and provenance of all series, and the studies -> one HTML page."""

import json
from pathlib import Path

from moescope import dynamics_report, report, tables
from moescope.job import job

RESULTS = Path("results")


def found(study, series, names, figures):
    """Tables and figures (PNG bytes) of a series in a study, or of all series together."""
    drawn = RESULTS / "figures" / study / series
    return {
        "tables": {name: tables.read(RESULTS / study / series / f"{name}.parquet") for name in names},
        "figures": {name: (drawn / f"{name}.png").read_bytes() for name in figures},
    }


def section(name, steps, figures, **known):
    """What the page says of one series."""
    shown, last = found("attribution", name, ["accuracy", "layer_importance"], figures), RESULTS / name / f"{steps[-1]}"
    scored = [RESULTS / name / f"{step}" / "provenance" / "attribute.json" for step in steps]
    read = {"manifest": last / "manifest.json", "audit": RESULTS / name / "audit.json"}
    found_of = {key: json.loads(path.read_text()) for key, path in read.items()}
    provenance = [json.loads(path.read_text()) for path in scored]
    predictions = tables.read(last / "predictions.parquet")
    summaries = {**shown["tables"], "figures": shown["figures"], "predictions": predictions}
    numbers = [step if isinstance(step, int) else None for step in steps]
    return report.Series(name, steps=numbers, provenance=provenance, **found_of, **summaries, **known)


def dynamics(series, **names):
    """What the page says of study dynamics."""
    of_series = [one | found("dynamics", one["name"], one["tables"], one["figures"]) for one in series]
    over_all = found("dynamics", "all", names["tables"], names["figures"])
    return dynamics_report.study([dynamics_report.Series(**one) for one in of_series], **over_all)


with job(snakemake):
    cfg = snakemake.params.cfg
    studies = [dynamics(**cfg["dynamics"])] if cfg["dynamics"] else []
    page = report.build([section(**one) for one in cfg["series"]], Path(__file__).parents[1] / "report", studies)
    report.write(page, snakemake.output[0])
