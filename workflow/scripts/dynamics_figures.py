"""Tables of study dynamics of a series -> the figures of its courses, PDF and PNG."""

from moescope import drawing, dynamics_plots, tables
from moescope.job import job

with job(snakemake):
    for figure, names in snakemake.params.cfg["figures"].items():
        shown = [tables.read(snakemake.input[name]) for name in names]
        axis = snakemake.params.cfg["axis"].get(figure, {})
        drawn = getattr(dynamics_plots, figure)(*shown, title=snakemake.wildcards.series, **axis)
        drawing.save(drawn, snakemake.output[f"{figure}_pdf"], snakemake.output[f"{figure}_png"])
