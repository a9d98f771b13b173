"""Neuron tables of every checkpoint of a series -> stability, concentration and overlap of its leading neurons."""

import json
from pathlib import Path

import polars as pl

from moescope import dynamics, prompt_dynamics, tables
from moescope.job import job

with job(snakemake):
    seed, prompts = snakemake.params.cfg["seed"], tables.read(snakemake.input.prompts)
    manifests = [json.loads(Path(path).read_text()) for path in snakemake.input.manifest]

    def checkpoints():
        for i, manifest in enumerate(manifests):

            def table(name, columns, i=i):
                paths = snakemake.input.get(name)
                return tables.read(paths[i], columns) if paths else None

            yield dynamics.Checkpoint(manifest["step"], manifest["tokens"], table)

    found = [dynamics.neuron_dynamics(checkpoints(), prompts, component, seed) for component in tables.COMPONENTS]
    frames = [neurons for neurons, _ in found]
    if snakemake.input.top_active:
        by_prompt = prompt_dynamics.prompt_dynamics(checkpoints(), prompts)
        tables.write(by_prompt, snakemake.output.prompt_dynamics)
        tokens = {manifest["step"]: manifest["tokens"] for manifest in manifests}
        frames.append(prompt_dynamics.summary(by_prompt, prompts, tokens, seed))
    tables.write(pl.concat(frames), snakemake.output.neuron_dynamics)
    tables.write(pl.concat(overlap for _, overlap in found), snakemake.output.overlap)
