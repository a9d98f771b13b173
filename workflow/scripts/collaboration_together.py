"""Study collaboration of all series -> their efficiency beside each other, and everything beside the published."""

import json
from pathlib import Path

import polars as pl

from moescope import collaboration_published, efficiency, expert_importance, published, tables
from moescope.job import job

PUBLISHED = Path(__file__).parents[2] / "resources" / "published" / "figures.csv"

with job(snakemake):
    cfg, prompts = snakemake.params.cfg, tables.read(snakemake.input.prompts)
    figures, gained, known = published.read(PUBLISHED), [], []
    files = (snakemake.input[name] for name in ("manifest", "predictions", "layers", "active_sums"))
    for series, manifest, *paths in zip(cfg["checkpoints"], *files, strict=True):
        manifest = json.loads(Path(manifest).read_text())
        scored = efficiency.Scored(manifest["step"], *map(tables.read, paths), manifest["shape"]["d"])
        gained.append(efficiency.efficiency(series, scored, prompts, cfg["seed"]))
        known.append(efficiency.relation_accuracy(series, scored.step, scored.predictions, prompts, cfg["seed"]))
    accuracy = pl.concat(known)
    compared = collaboration_published.efficiency(pl.concat(gained), cfg["repos"], figures)
    tables.write(compared, snakemake.output.efficiency)
    tables.write(accuracy, snakemake.output.relation_accuracy)

    ours = {series: {} for series in cfg["repos"]}
    comparable = cfg["importance"] == expert_importance.METHODS[0]  # else the paper's blocked experts are others
    for name in ("gains", "budgets", *(["blocking"] if comparable else []), "causality", "neuron_types"):
        for path in snakemake.input[name]:
            ours[Path(path).parent.name][name] = tables.read(path)
    for heads, routing in zip(snakemake.input.heads, snakemake.input.routing, strict=True):
        told = cfg["association"], cfg["permutations"], cfg["seed"]
        found = collaboration_published.correlations(tables.read(heads), tables.read(routing), prompts, *told)
        ours[Path(heads).parents[1].name]["correlations"] = found
    ours = {series: collaboration_published.Ours(**frames) for series, frames in ours.items()}
    beside = collaboration_published.beside_published(ours, accuracy, cfg["repos"], figures)
    tables.write(beside, snakemake.output.beside_published)
