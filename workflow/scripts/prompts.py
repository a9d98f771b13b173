"""Relations -> results/prompts.parquet."""

from pathlib import Path

from moescope import facts, relations, tables
from moescope.job import job

with job(snakemake):
    chosen = facts.read(snakemake.params.cfg, snakemake.input, Path(__file__).parents[2])
    tables.write(relations.prompt_table(chosen, snakemake.params.cfg["seed"]), snakemake.output[0])
