"""Files of a checkpoint -> its manifest: listing, hashes, shape, tokens seen. No weights are loaded."""

from pathlib import Path

from moescope import checkpoints, files, tables
from moescope.job import job

with job(snakemake):
    cfg, step, tokens = snakemake.params.cfg, int(snakemake.wildcards.step), None
    if snakemake.input.training:
        tokens = dict(tables.read(snakemake.input.training).select("step", "tokens").iter_rows())[step]
    directory = Path(snakemake.input.checkpoint[0]).parent
    manifest = checkpoints.manifest(
        snakemake.wildcards.series, step, cfg["source"], directory, cfg["gguf_file"], tokens
    )
    files.write_json(manifest, snakemake.output[0])
