"""Scores of one checkpoint -> the leading experts of every relation, and the heads that go with experts."""

from moescope import association, expert_importance, tables
from moescope.job import job

with job(snakemake):
    cfg = snakemake.params.cfg
    heads, routing, top_active, prompts = (
        tables.read(snakemake.input[name]) for name in ("heads", "routing", "top_active", "prompts")
    )
    importance = expert_importance.expert_importance(routing, top_active, prompts)
    tables.write(importance, snakemake.output.expert_importance)
    found = association.associate(
        heads,
        routing,
        importance,
        prompts,
        cfg["association"],
        cfg["importance"],
        cfg["permutations"],
        cfg["strongest"],
        cfg["seed"],
    )
    tables.write(found, snakemake.output.associations)
