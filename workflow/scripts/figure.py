"""A summary table -> one figure of it, PDF and PNG."""

from moescope import drawing, plots, tables
from moescope.job import job

with job(snakemake):
    draw = getattr(plots, snakemake.wildcards.figure)
    figure = draw(tables.read(snakemake.input[0]), title=snakemake.wildcards.series)
    drawing.save(figure, snakemake.output.pdf, snakemake.output.png)
