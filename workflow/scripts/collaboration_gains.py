"""Increases by layer of every checkpoint of a series -> where along the layers it gains, and in which stage."""

import json
from pathlib import Path

import polars as pl

from moescope import efficiency, tables
from moescope.job import job

with job(snakemake):
    cfg, prompts = snakemake.params.cfg, tables.read(snakemake.input.prompts)
    found = []
    for manifest, layers in zip(snakemake.input.manifest, snakemake.input.layers, strict=True):
        step = json.loads(Path(manifest).read_text())["step"]
        found.append(efficiency.gains(step, tables.read(layers), prompts, cfg["seed"], cfg["stages"]))
    tables.write(pl.concat(found), snakemake.output.gains)
