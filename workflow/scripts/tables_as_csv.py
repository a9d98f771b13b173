"""Result tables -> the same as CSV."""

from moescope import files, tables
from moescope.job import job

with job(snakemake):
    for table, csv in zip(snakemake.input, snakemake.output, strict=True):
        with files.atomic(csv) as path:
            tables.read(table).write_csv(path)
