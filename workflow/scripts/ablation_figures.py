"""What breaks in a series, and how faithful its scores are -> the figures of it, PDF and PNG."""

from moescope import ablation_plots, drawing, tables
from moescope.job import job

with job(snakemake):
    for figure, names in snakemake.params.cfg["figures"].items():
        shown = [tables.read(snakemake.input[name]) for name in names]
        axis = snakemake.params.cfg["axis"].get(figure, {})
        drawn = getattr(ablation_plots, figure)(*shown, title=snakemake.wildcards.series, **axis)
        drawing.save(drawn, snakemake.output[f"{figure}_pdf"], snakemake.output[f"{figure}_png"])
