"""Study dynamics of all series -> the tables of the paper, and what of it is more than sparsity."""

from pathlib import Path

import polars as pl

from moescope import published, sparsity, tables
from moescope.job import job

PUBLISHED = Path(__file__).parents[2] / "resources" / "published" / "figures.csv"

with job(snakemake):
    cfg, prompts = snakemake.params.cfg, tables.read(snakemake.input.prompts)

    def of_series(name, names):
        return dict(zip(names, map(tables.read, snakemake.input[name]), strict=True))

    neurons, by_prompt = (of_series(name, cfg["series"]) for name in ("neuron_dynamics", "prompt_dynamics"))
    layers, ablated = of_series("layer_dynamics", cfg["series"]), of_series("robustness_summary", cfg["ablated"])
    figures = published.read(PUBLISHED)
    tables.write(published.table_2(neurons, cfg["windows"], cfg["repos"], figures), snakemake.output.table_2)
    tables.write(published.table_3(layers, cfg["repos"], figures), snakemake.output.table_3)
    tables.write(published.table_4(ablated, cfg["repos"], figures), snakemake.output.table_4)
    if cfg["pairs"]:
        sides = {name: sparsity.SeriesTables(name, neurons[name], by_prompt.get(name)) for name in cfg["series"]}
        found = [
            sparsity.sparsity(sides[pair["moe"]], sides[pair["dense"]], prompts, seed=cfg["seed"])
            for pair in cfg["pairs"]
        ]
        tables.write(pl.concat(rows for rows, _ in found), snakemake.output.sparsity)
        tables.write(pl.concat(verdicts for _, verdicts in found), snakemake.output.verdict)
