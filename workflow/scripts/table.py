"""A result table -> the same as CSV."""

from moescope import files, tables
from moescope.job import job

with job(snakemake), files.atomic(snakemake.output[0]) as path:
    tables.read(snakemake.input[0]).write_csv(path)
