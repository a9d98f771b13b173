"""A summary table -> one figure of it, PDF and PNG."""

from moescope import plots, tables
from moescope.job import job

with job(snakemake):
    draw = getattr(plots, snakemake.wildcards.figure)
    figure = draw(tables.read(snakemake.input[0]), title=snakemake.wildcards.series)
    plots.save(figure, snakemake.output.pdf, snakemake.output.png)
