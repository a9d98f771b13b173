"""All experiments on the experts of one loaded model, from one clean run -> tables.

Budgets and blocking (``expert_ablation``), suppression, forcing and integrated gradients (``coupling``) share the clean
run, what its routers choose, and the passes that take it up in the middle.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import polars as pl
import torch
from torch import nn

from moescope import coupling, expert_ablation, expert_sets, passes, replay
from moescope.clean import CleanRun
from moescope.coupling import Tested
from moescope.pairs import Pair
from moescope.precision import computing_in_float32
from moescope.selection import FOLDS


@dataclass(frozen=True)
class Asked:
    """What is done: sizes of ``budgets`` by mode (or ``all``), the ``weights`` of what is left, the ``semantics`` of
    blocking, the method of ``importance`` whose leading experts are blocked, the ``pairs`` of a head and an expert
    that are tested on all prompts beside those of the table ``associations``, how many controls of each kind
    (``seeds``), the ``gradient_steps`` of integrated gradients."""

    budgets: Mapping[str, Sequence[int] | str] = field(
        default_factory=lambda: dict.fromkeys(expert_ablation.MODES, "all")
    )
    weights: Sequence[str] = expert_ablation.WEIGHTS
    semantics: Sequence[str] = expert_ablation.SEMANTICS
    importance: str = "top_neuron_frequency"
    pairs: Sequence[Sequence[int]] = ()
    seeds: int = 5
    gradient_steps: int = coupling.STEPS
    seed: int = 0

    @classmethod
    def of(cls, cfg: Mapping) -> Asked:
        """From a configuration that may hold more."""
        return cls(**{one.name: cfg[one.name] for one in fields(cls)})


def intervene(
    model: nn.Module,
    tokenizer: object,
    prompts: pl.DataFrame,
    importance: pl.DataFrame,
    associations: pl.DataFrame,
    asked: Asked = Asked(),
    target: str = "object",
    progress: bool = False,
) -> dict[str, pl.DataFrame]:
    """Interfere with the experts of a model, and with the heads that may drive them, and ask the prompts again.

    ``importance`` and ``associations``: the tables ``expert_importance`` and ``associations`` of this model and these
    prompts. Returns ``expert_interventions``, ``gates`` and ``gradients``. Raises what ``CleanRun.of`` raises,
    ExpertError where no layer routes, InterventionError where what is asked for is not there.
    """
    with torch.no_grad(), computing_in_float32(model):
        run = CleanRun.of(model, tokenizer, prompts, target)
        return intervene_run(run, importance, associations, asked, progress)[0]


@torch.no_grad()
def intervene_run(
    run: CleanRun,
    importance: pl.DataFrame,
    associations: pl.DataFrame,
    asked: Asked = Asked(),
    progress: bool = False,
) -> tuple[dict[str, pl.DataFrame], dict]:
    """The same from a clean run, within ``computing_in_float32``; with a report.

    The report: ``notes`` (lines on what could not be done, and on how well controls match), ``replay_error`` (nats) and
    ``intervention_seconds``.
    """
    start = time.perf_counter()
    shared = any(site.kind == "shared" for site in run.decomposition.sites)
    expert_ablation.require_experts(run)
    slots = expert_ablation.slots_of(run)
    budgets = expert_ablation.budgets(asked.budgets, asked.weights, slots, shared)
    parts, labels = expert_sets.parts(run.prompts)
    clean, times = passes.clean_routing(run, replay.by_length(run, labels.tolist()))
    found = expert_ablation.Interventions(run)
    expert_ablation.add_clean(found, run)
    pairs, left_out = _tested(run, associations, asked.pairs)
    with replay.sparing(run.decomposition) as distinct:
        again = passes.Passes(run, distinct, labels)
        error = again.error()
        expert_ablation.add_budgets(found, again, budgets, progress)
        hits = expert_ablation.hits(again, clean, times)
        last = expert_ablation.hits(again, clean, torch.bincount(again.last, minlength=len(times)))
        plan, missing = expert_sets.plan(importance, asked.importance, parts, hits, asked.seeds, asked.seed)
        blocked = expert_ablation.add_blocking(found, again, plan, parts, asked.semantics, asked.importance, progress)
        gates = coupling.suppress_and_force(found, again, clean, pairs, asked.seeds, asked.seed, progress)
    ratios = (expert_sets.hits_ratio(plan, parts, of) for of in (hits, last))
    gradients = coupling.integrated_gradients(run, pairs, asked.gradient_steps, progress)
    report = {
        "notes": [*left_out, *missing, *blocked, *_on_controls(*ratios)],
        "replay_error": error,
        "intervention_seconds": time.perf_counter() - start,
    }
    return {"expert_interventions": found.table(), "gates": gates, "gradients": gradients}, report


def _on_controls(everywhere: Mapping[int, float], last: Mapping[int, float]) -> list[str]:
    return [
        f"blocked top {size}: chosen {ratio:.2f} times as often as the matched controls over all positions of prompts, "
        + (f"{last[size]:.2f} times at the last one" if size in last else "which are never chosen at the last one")
        for size, ratio in everywhere.items()
    ]


def _tested(
    run: CleanRun, associations: pl.DataFrame, named: Sequence[Sequence[int]]
) -> tuple[list[Tested], list[str]]:
    """The pairs that are named, tested on all prompts, and those found on one fold, tested on the other; none, and a
    line on it, where routers give no shares of a probability that could be followed."""
    if run.trace.scoring is None:
        return [], ["pairs of a head and an expert: what the routers make of their logits is not known"]
    everyone = np.ones(len(run.prompts), dtype=bool)
    pairs = [Tested(pair, everyone, None) for pair in dict.fromkeys(Pair(*pair) for pair in named)]
    found = associations.filter(pl.col("relation").is_null(), pl.col("fold").is_not_null())
    inside = {fold: run.prompts["group"].is_in(list(groups)).to_numpy() for fold, groups in FOLDS.items()}
    rows = found.sort("fold", *Pair._fields).select(*Pair._fields, "fold").iter_rows()
    return pairs + [Tested(Pair(*pair), inside[fold], fold) for *pair, fold in rows], []
