"""Experiments on every checkpoint of a series with experts -> what breaks, what drives what, and which lists agree."""

import json
from pathlib import Path

import polars as pl

from moescope import causality, collaboration, collaboration_published, expert_importance, tables
from moescope.job import job

PUBLISHED = Path(__file__).parents[2] / "resources" / "published" / "top_experts.csv"
READ = ("expert_interventions", "gates", "gradients", "associations", "expert_importance", "routing")

with job(snakemake):
    cfg, prompts, found = snakemake.params.cfg, tables.read(snakemake.input.prompts), []
    model = collaboration_published.MODELS.get(cfg["repo"])
    published = expert_importance.read_published(PUBLISHED).filter(pl.col("model") == pl.lit(model, pl.String))
    for manifest, *paths in zip(snakemake.input.manifest, *(snakemake.input[name] for name in READ), strict=True):
        step = json.loads(Path(manifest).read_text())["step"]
        ran, gates, gradients, associations, listed, routing = map(tables.read, paths)
        experts = expert_importance.experts_of(routing)
        found.append(
            {
                "budgets": collaboration.budgets(step, ran, prompts, cfg["seed"]),
                "blocking": collaboration.blocking(step, ran, prompts, cfg["seed"]),
                "causality": causality.causality(step, ran, gates, gradients, associations, prompts, cfg["seed"]),
                "expert_overlap": expert_importance.expert_overlap(listed, published, experts, step),
            }
        )
    for name in found[0]:
        tables.write(pl.concat(tables_of[name] for tables_of in found), snakemake.output[name])
