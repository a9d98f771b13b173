"""Leading neurons of every checkpoint of a series with shared experts -> how many are shared, and shared by whom."""

import json
from pathlib import Path

import polars as pl

from moescope import neuron_types, tables
from moescope.job import job

READ = ("top_active", "ffn_neurons", "active_sums", "routing")

with job(snakemake):
    seed, prompts, found = snakemake.params.cfg["seed"], tables.read(snakemake.input.prompts), []
    relations = prompts["relation"].unique().sort().to_list()
    for manifest, *paths in zip(snakemake.input.manifest, *(snakemake.input[name] for name in READ), strict=True):
        known = json.loads(Path(manifest).read_text())
        step, (top, neurons, sums, routing) = known["step"], map(tables.read, paths)
        found.append(
            {
                "neuron_types": neuron_types.neuron_types(step, top, neurons, sums, prompts, seed),
                "shared_neurons": neuron_types.shared_neurons(step, neurons, relations, known["shape"]["I"]),
                "neuron_overlap": neuron_types.neuron_overlap(step, top, neurons, routing, prompts, seed),
            }
        )
    for name in found[0]:
        tables.write(pl.concat(tables_of[name] for tables_of in found), snakemake.output[name])
