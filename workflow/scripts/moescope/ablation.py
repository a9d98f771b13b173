"""One loaded model, its scores and the prompts -> what breaks when heads and neurons are taken away.

Sets that several interventions have in common run once, on the prompts that any of them is tested on. What lies before
the first layer of a set is taken from one clean pass; so is that layer, where its feed-forward neurons are all that is
taken away: what they wrote comes off the stream.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from tqdm import tqdm

from moescope import interventions, replay, selection, tables
from moescope.clean import CleanRun
from moescope.decomposition import Decomposition, LayerTrace
from moescope.interventions import Target
from moescope.passes import Passes
from moescope.precision import computing_in_float32

_FFN_KINDS = ("dense", "shared", "routed")


def ablate(
    model: nn.Module,
    tokenizer: object,
    prompts: pl.DataFrame,
    frames: Mapping[str, pl.DataFrame],
    rankings: Sequence[str] = ("signed",),
    seeds: int = 5,
    seed: int = 0,
    target: str = "object",
    progress: bool = False,
) -> dict[str, pl.DataFrame]:
    """Take away a model's most important heads and neurons, and controls, and score the prompts again.

    ``frames``: what ``attribution.attribute`` returns for this model and these prompts (``heads``, ``ffn_neurons`` and,
    for cross-fitting, ``ffn_groups``). ``rankings``: ``signed``, ``abs``, ``per_relation``; ``seeds``: controls of each
    kind. Returns ``ablations``. Raises what ``CleanRun.of`` and ``selection.plan`` raise.
    """
    with torch.no_grad(), computing_in_float32(model):
        run = CleanRun.of(model, tokenizer, prompts, target)
        return {"ablations": ablate_run(run, frames, rankings, seeds, seed, progress)[0]}


@torch.no_grad()
def ablate_run(
    run: CleanRun,
    frames: Mapping[str, pl.DataFrame],
    rankings: Sequence[str] = ("signed",),
    seeds: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> tuple[pl.DataFrame, dict]:
    """The same from a clean run, within ``computing_in_float32``; with a report.

    The report: ``interventions`` asked for, ``sets`` run, ``passes`` over all prompts they came to, ``matched`` (per
    size and ranking the ``share`` of matched neurons with exactly the deciles asked for, and the ``magnitude_ratio``
    of the selected to them), ``left_out`` (what was not available), ``replay_error`` (nats) and ``ablation_seconds``.
    Raises ReplayError where a replay of the clean run does not give its log-probabilities.
    """
    start = time.perf_counter()
    plan = selection.plan(frames, run.prompts, rankings, seeds, seed)
    sets = _distinct(run, plan)
    rows = [_clean_rows(run)]
    with replay.sparing(run.decomposition) as distinct:
        passes = Passes(run, distinct)
        errors = [passes.error()]
        removed = _Removed(run)
        for one in tqdm(sorted(sets, key=lambda s: s.start), desc="ablating", unit="set", disable=not progress):
            if one.start != passes.layer:
                passes.start_at(one.start, neurons=True)
                errors.append(passes.error(few=True))
            stream = _without(passes, one.targets)
            with interventions.zeroed(run.decomposition, one.targets):
                log_prob, rank = passes.run(one.prompts, stream)
            share = removed.share(one.targets)
            rows += (_rows(run, which, log_prob, rank, share) for which in one.interventions)
    report = {
        "interventions": len(plan.interventions),
        "sets": len(sets),
        "passes": sum(int(one.prompts.sum()) for one in sets) / len(run.prompts),
        "matched": _matched(plan),
        "left_out": plan.left_out,
        "replay_error": max(errors),
        "ablation_seconds": time.perf_counter() - start,
    }
    return tables.check(pl.concat(rows), "ablations"), report


@dataclass
class _Set:
    """Units that are taken away together, the layer that their runs ``start`` at, the prompts [P] that this is run on,
    and what it stands for."""

    targets: list[Target]
    start: int
    prompts: np.ndarray
    interventions: list[selection.Intervention] = field(default_factory=list)


def _distinct(run: CleanRun, plan: selection.Plan) -> list[_Set]:
    found: dict[tuple[str, bytes], _Set] = {}
    for which in plan.interventions:
        key = which.site, which.units.tobytes()
        if key not in found:
            targets = _targets(run, plan.index[which.site][which.units])
            found[key] = _Set(targets, _start(run.decomposition, targets), np.zeros(len(run.prompts), dtype=bool))
        found[key].prompts[which.prompts] = True
        found[key].interventions.append(which)
    return list(found.values())


def _targets(run: CleanRun, units: pl.DataFrame) -> list[Target]:
    if "head" in units.columns:
        return [interventions.head(run.decomposition, layer, head) for layer, head in units.rows()]
    sites = units.group_by("layer", "kind", "expert", maintain_order=True).agg("neuron")
    return [Target(layer, kind, neurons, expert) for layer, kind, expert, neurons in sites.rows()]


def _start(decomposition: Decomposition, targets: list[Target]) -> int:
    """The first layer that has to run: the first one touched, or, as feed-forward neurons write what they write
    whatever the others of their layer do, the one after it (at most the last, whose stream is not whole). A norm behind
    them makes what they write depend on one another."""
    first = min(target.layer for target in targets)
    normed = any(target.site(decomposition).norm is not None for target in targets if target.layer == first)
    return first if normed or targets[0].kind == "attn" else min(first + 1, len(decomposition.layers) - 1)


def _without(passes: Passes, targets: list[Target]) -> Tensor | None:
    """The stream at every prefix, less what those of the targets that lie before it wrote: [prefixes, d]."""
    passed = [target for target in targets if target.layer < passes.layer]
    stream = passes.before.residual_out
    return stream - _written(passes.clean.decomposition, passes.before, passed) if passed else stream


class _Removed:
    """Last position, clean run: the share of what all feed-forward layers write that is taken away (behind a norm: of
    what they write through it as it was)."""

    def __init__(self, run: CleanRun):
        self.trace = run.trace
        decomposition = run.decomposition
        whole = (
            sum(run.trace.write(site) for site in sites).double().square().sum(1)
            for layer in range(len(run.trace.layers))
            if (sites := decomposition.at(layer, *_FFN_KINDS))
        )
        self.whole = sum(whole)

    def share(self, targets: list[Target]) -> np.ndarray | None:
        """Sum over layers of |what the targets write|^2 / sum over layers of |F|^2: [P]; None for heads."""
        if targets[0].kind == "attn":
            return None
        layers = defaultdict(list)
        for target in targets:
            layers[target.layer].append(target)
        written = (_written(self.trace.decomposition, self.trace.layers[i], layers[i]) for i in layers)
        return (sum(total.double().square().sum(1) for total in written) / self.whole).cpu().numpy()


def _written(decomposition: Decomposition, record: LayerTrace, targets: list[Target]) -> Tensor:
    """What feed-forward neurons of one layer write at the positions of its record: [n, d]."""
    total = torch.zeros_like(record.residual_out)
    for target in targets:
        site = target.site(decomposition)
        neurons = torch.as_tensor(target.neurons, device=total.device)
        values = site.mapped_values(target.expert)[neurons].float()
        coefficients = record.coefficients[site.name]
        if target.kind == "routed":
            rows, slots = torch.where(record.index == target.expert)
            total.index_add_(0, rows, coefficients[rows, slots][:, neurons] @ values)
        else:
            total += coefficients[:, neurons] @ values
    return total


def _clean_rows(run: CleanRun) -> pl.DataFrame:
    everyone = np.arange(len(run.prompts))
    nothing = selection.Intervention("none", "0", None, "none", None, None, np.empty(0), everyone)
    return _rows(run, nothing, *run.answers(), np.zeros(len(everyone)))


def _rows(
    run: CleanRun, which: selection.Intervention, log_prob: np.ndarray, rank: np.ndarray, removed: np.ndarray | None
) -> pl.DataFrame:
    names = ("site", "size", "ranking", "control", "fold", "seed")
    types = {"fold": tables.ID, "seed": tables.ID}
    some = which.prompts
    share = [None] * len(some) if removed is None else removed[some]
    return pl.DataFrame(
        {
            "prompt_id": run.prompts["prompt_id"].gather(some),
            "rank": rank[some],
            "log_prob": log_prob[some].astype(np.float32),
            "removed": pl.Series(share, dtype=tables.SCORE).fill_nan(None),
        }
    ).with_columns(pl.lit(getattr(which, name), types.get(name, tables.TEXT)).alias(name) for name in names)


def _matched(plan: selection.Plan) -> dict[str, dict[str, float | None]]:
    if not plan.matched:
        return {}
    measures = pl.col("share", "magnitude_ratio").mean()
    means = pl.DataFrame(plan.matched).group_by("size", "ranking").agg(measures).sort("size", "ranking")
    return {f"{size} {ranking}": {"share": s, "magnitude_ratio": m} for size, ranking, s, m in means.rows()}
