"""Tables of study collaboration over all series -> the figures of them beside each other, PDF and PNG."""

from moescope import collaboration_plots, drawing, tables
from moescope.job import job

with job(snakemake):
    names = snakemake.params.cfg["series"]
    shown = {name: tables.read(snakemake.input[name]) for name in ("efficiency", "relation_accuracy")}
    shown["gain_curves"] = dict(zip(names, map(tables.read, snakemake.input.gain_curves), strict=True))
    for figure, table in shown.items():
        drawn = getattr(collaboration_plots, figure)(table, title="all series")
        drawing.save(drawn, snakemake.output[f"{figure}_pdf"], snakemake.output[f"{figure}_png"])
