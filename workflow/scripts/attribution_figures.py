"""Summary tables of a series -> its figures of attribution, PDF and PNG."""

from moescope import drawing, plots, tables
from moescope.job import job

with job(snakemake):
    for figure, (table,) in snakemake.params.cfg["figures"].items():
        drawn = getattr(plots, figure)(tables.read(snakemake.input[table]), title=snakemake.wildcards.series)
        drawing.save(drawn, snakemake.output[f"{figure}_pdf"], snakemake.output[f"{figure}_png"])
