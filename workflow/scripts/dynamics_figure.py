"""Tables of study dynamics -> one figure of one series, PDF and PNG."""

from moescope import drawing, dynamics_plots, tables
from moescope.job import job

with job(snakemake):
    draw = getattr(dynamics_plots, snakemake.wildcards.figure)
    shown = map(tables.read, snakemake.input)
    figure = draw(*shown, title=snakemake.wildcards.series, **snakemake.params.cfg)
    drawing.save(figure, snakemake.output.pdf, snakemake.output.png)
