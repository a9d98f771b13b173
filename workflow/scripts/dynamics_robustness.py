"""Ablations of every ablated checkpoint of a series -> what breaks without a part, and how faithful the score is."""

import json
from pathlib import Path

from moescope import robustness, sample, tables
from moescope.job import job

with job(snakemake):
    seed, prompts = snakemake.params.cfg["seed"], tables.read(snakemake.input.prompts)
    manifests = [json.loads(Path(path).read_text()) for path in snakemake.input.manifest]

    def checkpoints(name):
        for manifest, path in zip(manifests, snakemake.input.get(name), strict=True):
            yield sample.Checkpoint(manifest["step"], manifest["tokens"], tables.read(path))

    heads = tables.read(snakemake.input.heads, ["layer", "head"]).unique().height
    neurons = tables.read(snakemake.input.ffn_neurons, ["neuron"]).height
    by_step, summary = robustness.robustness(checkpoints("ablations"), prompts, heads, neurons, seed)
    tables.write(by_step, snakemake.output.robustness)
    tables.write(summary, snakemake.output.robustness_summary)
    if snakemake.input.faithfulness_prompts:
        ranked = robustness.score_faithfulness(checkpoints("faithfulness_prompts"), prompts, seed)
        tables.write(ranked, snakemake.output.score_faithfulness)
