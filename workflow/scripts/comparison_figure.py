"""Courses of all series -> the figure that lays them over each other, PDF and PNG."""

from moescope import comparison_plots, drawing, tables
from moescope.job import job

with job(snakemake):
    cfg = snakemake.params.cfg
    courses = (
        dict(zip(cfg["series"], map(tables.read, snakemake.input[name]), strict=True))
        for name in ("neuron_dynamics", "layer_importance", "profile_similarity")
    )
    figure = comparison_plots.comparison(*courses, axis=cfg["axis"])
    drawing.save(figure, snakemake.output.pdf, snakemake.output.png)
