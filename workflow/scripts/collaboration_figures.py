"""Tables of study collaboration of a series -> its figures, PDF and PNG."""

from moescope import collaboration_plots, coupling_plots, drawing, leading_plots, tables
from moescope.job import job

MODULES = {
    module.__name__.rpartition(".")[2]: module for module in (collaboration_plots, coupling_plots, leading_plots)
}

with job(snakemake):
    for figure, module in snakemake.params.cfg["figures"].items():
        draw, table = getattr(MODULES[module], figure), tables.read(snakemake.input[figure])
        drawn = drawing.drawn_or_said(draw, table, title=snakemake.wildcards.series)
        drawing.save(drawn, snakemake.output[f"{figure}_pdf"], snakemake.output[f"{figure}_png"])
