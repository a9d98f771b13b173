"""A dense checkpoint, the prompts and the routing of a mixture of experts -> the dense neurons seen through it."""

import json
from pathlib import Path

import torch

from moescope import checkpoints, clean, masking, precision, provenance, tables
from moescope.job import device, job

with job(snakemake):
    cfg = snakemake.params.cfg
    entry = json.loads(Path(snakemake.input.manifest).read_text())
    prompts, routing = tables.read(snakemake.input.prompts), tables.read(snakemake.input.routing)
    opened = checkpoints.opened(entry, cfg["dtype"], device(snakemake))
    with opened as (model, tokenizer), torch.no_grad(), precision.computing_in_float32(model):
        run = clean.CleanRun.of(model, tokenizer, prompts, cfg["target"], cfg["norm"])
        masked = masking.masked_groups(run, routing, cfg["seed"], progress=True)
    tables.write(masked, snakemake.output.masked_groups)
    provenance.write(snakemake.output.provenance, cfg, device=device(snakemake), decomposition_error=run.error)
