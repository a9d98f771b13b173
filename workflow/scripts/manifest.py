"""A checkpoint on this disk or on the hub -> its manifest: listing, hashes, shape, tokens seen; without its weights."""

from pathlib import Path

from moescope import files, manifests, tables
from moescope.job import job

with job(snakemake):
    cfg, wildcards = dict(snakemake.params.cfg), snakemake.wildcards
    step = int(wildcards.step) if wildcards.step.isdecimal() else None
    if snakemake.input.training:
        cfg["tokens"] = dict(tables.read(snakemake.input.training).select("step", "tokens").iter_rows())[step]
    if cfg["source"] == "hub":
        del cfg["source"]
        manifest = manifests.on_hub(wildcards.series, step, **cfg)
    else:
        manifest = manifests.on_disk(wildcards.series, step, Path(snakemake.input.checkpoint[0]).parent, **cfg)
    files.write_json(manifest, snakemake.output[0])
