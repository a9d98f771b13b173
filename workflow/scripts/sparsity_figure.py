"""Courses of paired series and what they come to -> the figure of the sparsity question, PDF and PNG."""

from moescope import comparison_plots, drawing, tables
from moescope.job import job

with job(snakemake):
    cfg, sparsity, verdict = snakemake.params.cfg, snakemake.input.sparsity, snakemake.input.verdict
    neurons = dict(zip(cfg["series"], map(tables.read, snakemake.input.neuron_dynamics), strict=True))
    figure = comparison_plots.sparsity(tables.read(sparsity), tables.read(verdict), neurons, axis=cfg["axis"])
    drawing.save(figure, snakemake.output.pdf, snakemake.output.png)
