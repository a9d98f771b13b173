"""Figures, summaries and provenance of all series, and the studies -> one HTML page."""

import json
from pathlib import Path

from moescope import collaboration_report, dynamics_report, report, tables
from moescope.job import job

RESULTS = Path("results")


def shown(study, name, names, figures):
    """Tables and figures (PNG bytes) of a series in a study, or of all series together."""
    drawn = RESULTS / "figures" / study / name
    found = {table: tables.read(RESULTS / study / name / f"{table}.parquet") for table in names}
    return {"tables": found, "figures": {figure: (drawn / f"{figure}.png").read_bytes() for figure in figures}}


def section(name, steps, figures, **known):
    """What the page says of one series."""
    found, last = shown("attribution", name, ["accuracy", "layer_importance"], figures), RESULTS / name / f"{steps[-1]}"
    provenance = [json.loads((RESULTS / name / f"{step}/provenance/attribute.json").read_text()) for step in steps]
    known |= {"manifest": json.loads((last / "manifest.json").read_text()), "provenance": provenance}
    known |= {"audit": json.loads((RESULTS / name / "audit.json").read_text()), "figures": found["figures"]}
    numbers = [step if isinstance(step, int) else None for step in steps]
    predictions = tables.read(last / "predictions.parquet")
    return report.Series(name, steps=numbers, predictions=predictions, **known, **found["tables"])


def of_study(study, name, checkpoint=None, **known):
    """What a study says of one series; ``checkpoint``: tables of one of its checkpoints, and notes on it."""
    known |= shown(study, name, known["tables"], known["figures"])
    if checkpoint:
        folder = RESULTS / name / checkpoint["step"]
        known["tables"] |= {table: tables.read(folder / f"{table}.parquet") for table in checkpoint["tables"]}
        known["notes"] = json.loads((folder / "provenance/intervene.json").read_text())["notes"]
    return {"name": name, **known}


with job(snakemake):
    cfg, studies = snakemake.params.cfg, []
    for study, page in {"dynamics": dynamics_report, "collaboration": collaboration_report}.items():
        if told := cfg[study]:
            series = [page.Series(**of_study(study, **one)) for one in told["series"]]
            together = shown(study, "all", told["tables"], told["figures"])
            studies.append(page.study(series, **together, **told["options"]))
    written = report.build([section(**one) for one in cfg["series"]], Path(__file__).parents[1] / "report", studies)
    report.write(written, snakemake.output[0])
