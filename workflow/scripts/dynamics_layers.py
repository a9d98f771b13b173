"""Layer tables of every checkpoint of a series -> how alike its layer profiles are, and when they settle."""

import json
from pathlib import Path

from moescope import layer_dynamics, sample, tables
from moescope.job import job

with job(snakemake):
    cfg = snakemake.params.cfg
    manifests = [json.loads(Path(path).read_text()) for path in snakemake.input.manifest]
    checkpoints = (
        sample.Checkpoint(manifest["step"], manifest["tokens"], tables.read(path))
        for manifest, path in zip(manifests, snakemake.input.layers, strict=True)
    )
    found = layer_dynamics.layer_dynamics(
        checkpoints, tables.read(snakemake.input.prompts), cfg["windows"], cfg["seed"]
    )
    tables.write(found[0], snakemake.output.layer_dynamics)
    tables.write(found[1], snakemake.output.profile_similarity)
