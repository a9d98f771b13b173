"""Tables of every checkpoint of a series -> its accuracy, layer importance and top experts over training."""

import json
from pathlib import Path

from moescope import audit, overview, sample, tables
from moescope.job import job

with job(snakemake):
    manifests = [json.loads(Path(path).read_text()) for path in snakemake.input.manifest]
    prompts = tables.read(snakemake.input.prompts)
    exposure = tables.read(snakemake.input.exposure) if snakemake.input.exposure else None
    seed, scored = snakemake.params.cfg["seed"], [json.loads(Path(p).read_text()) for p in snakemake.input.provenance]
    prints = [one["checkpoint"]["fingerprint"] for one in scored]
    audit.duplicated(manifests, prints, snakemake.params.cfg["allow_duplicates"])

    def checkpoints(paths):
        for manifest, path in zip(manifests, paths, strict=True):
            yield sample.Checkpoint(manifest["step"], manifest["tokens"], tables.read(path))

    accuracy = overview.accuracy(checkpoints(snakemake.input.predictions), prompts, exposure, seed)
    tables.write(accuracy, snakemake.output.accuracy)
    importance = overview.layer_importance(checkpoints(snakemake.input.layers), prompts, seed)
    tables.write(importance, snakemake.output.layer_importance)
    if snakemake.input.routing:
        routing = tables.read(snakemake.input.routing)
        experts = overview.top_experts(routing, prompts, manifests[-1]["step"], seed)
        tables.write(experts, snakemake.output.top_experts)
