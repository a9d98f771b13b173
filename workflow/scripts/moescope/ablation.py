"""One loaded model, its scores and the prompts -> what breaks when heads and neurons are taken away.

Sets that several interventions have in common run once, on the prompts that any of them is tested on; what lies before
the first layer of a set is taken from one clean pass.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from tqdm import tqdm

from moescope import interventions, replay, selection, tables
from moescope.clean import BATCH_TOKENS, CleanRun
from moescope.decomposition import routed_rows
from moescope.errors import MoescopeError
from moescope.interventions import Target
from moescope.precision import computing_in_float32

#: Tokens of one forward batch where nothing but the cache of a CPU bounds it.
_CACHED_TOKENS = 2_048
#: Largest difference between a prompt's clean log-probability in the replay and in the whole pass (nats).
TOLERANCE = 1e-3

_FFN_KINDS = ("dense", "shared", "routed")


class AblationError(MoescopeError):
    """A model whose forward pass cannot be taken up in the middle."""


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

    The report: ``interventions`` asked for, ``sets`` run, ``passes`` over all prompts they came to, ``matched`` (the
    share of the matched neurons that has exactly the deciles asked for, per size and ranking), ``left_out`` (what was
    not available), ``replay_error`` (nats) and ``ablation_seconds``. Raises AblationError where a replay of the clean
    run does not give its log-probabilities.
    """
    start = time.perf_counter()
    plan = selection.plan(frames, run.prompts, rankings, seeds, seed)
    sets = _distinct(run, plan)
    rows = [_clean_rows(run)]
    with replay.sparing(run.decomposition) as distinct:
        replayed = _Replayed(run, distinct)
        error = replayed.error()
        removed = _Removed(run)
        for one in tqdm(sorted(sets, key=lambda s: s.first_layer), desc="ablating", unit="set", disable=not progress):
            replayed.start_at(one.first_layer)
            with interventions.zeroed(run.decomposition, one.targets):
                log_prob, rank = replayed.run(one.prompts)
            share = removed.share(one.targets)
            rows += (_rows(run, which, log_prob, rank, share) for which in one.interventions)
    report = {
        "interventions": len(plan.interventions),
        "sets": len(sets),
        "passes": sum(int(one.prompts.sum()) for one in sets) / len(run.prompts),
        "matched": _matched(plan),
        "left_out": plan.left_out,
        "replay_error": error,
        "ablation_seconds": time.perf_counter() - start,
    }
    return tables.check(pl.concat(rows), "ablations"), report


@dataclass
class _Set:
    """Units that are taken away together, the prompts [P] that this is to be run on, and what it stands for."""

    targets: list[Target]
    prompts: np.ndarray
    interventions: list[selection.Intervention] = field(default_factory=list)

    @property
    def first_layer(self) -> int:
        return min(target.layer for target in self.targets)


def _distinct(run: CleanRun, plan: selection.Plan) -> list[_Set]:
    found: dict[tuple[str, bytes], _Set] = {}
    for which in plan.interventions:
        key = which.site, which.units.tobytes()
        if key not in found:
            targets = _targets(run, plan.index[which.site][which.units])
            found[key] = _Set(targets, np.zeros(len(run.prompts), dtype=bool))
        found[key].prompts[which.prompts] = True
        found[key].interventions.append(which)
    return list(found.values())


def _targets(run: CleanRun, units: pl.DataFrame) -> list[Target]:
    if "head" in units.columns:
        return [interventions.head(run.decomposition, layer, head) for layer, head in units.rows()]
    sites = units.group_by("layer", "kind", "expert", maintain_order=True).agg("neuron")
    return [Target(layer, kind, neurons, expert) for layer, kind, expert, neurons in sites.rows()]


class _Replayed:
    """The prompts, run from a given layer on with what the clean run put there."""

    def __init__(self, run: CleanRun, distinct: replay.Distinct):
        self.clean, self.distinct, self.groups = run, distinct, replay.by_length(run)
        model, device = run.model, run.decomposition.device
        upcast = any(p.dtype != torch.float32 for p in model.parameters())  # which every batch pays for
        self.tokens = BATCH_TOKENS if upcast or device.type != "cpu" else _CACHED_TOKENS
        self.layer, self.hidden = 0, [None] * len(self.groups)

    def start_at(self, layer: int) -> None:
        """Go on to a later layer: one clean pass in all, whatever the number of stops."""
        if layer == self.layer:
            return
        decomposition = self.clean.decomposition
        for i, group in enumerate(self.groups):
            parts = []
            for part in self._parts(group, torch.arange(len(group.rows), device=group.rows.device)):
                with self._resumed(i, part):
                    parts.append(replay.hidden_at(decomposition, layer, group.ids[part]))
            self.hidden[i] = torch.cat(parts)
        self.layer = layer

    def run(self, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log p(target) and rank of the prompts named in a mask [P]; what is not asked for is NaN and 0."""
        device, target = self.clean.decomposition.device, self.clean.target
        asked = torch.from_numpy(prompts).to(device)
        log_prob = torch.full((len(prompts),), torch.nan, dtype=torch.float64, device=device)
        rank = torch.zeros(len(prompts), dtype=torch.long, device=device)
        for i, group in enumerate(self.groups):
            for part in self._parts(group, asked[group.rows].nonzero()[:, 0]):
                with self._resumed(i, part):
                    logits = replay.last_logits(self.clean.model, group.ids[part])
                some = group.rows[part]
                its = target[some]
                log_prob[some] = replay.log_prob(logits, its)
                rank[some] = 1 + (logits > logits.gather(1, its[:, None])).sum(1)
        return log_prob.cpu().numpy(), rank.cpu().numpy()

    def error(self) -> float:
        """Largest difference of the clean run's log-probabilities here and in the whole pass, in nats."""
        logits, target = self.clean.trace.logits, self.clean.target
        found, _ = self.run(np.ones(len(target), dtype=bool))
        error = float(np.abs(found - replay.log_prob(logits, target).cpu().numpy()).max())
        if not error <= TOLERANCE:
            name = type(self.clean.model).__name__
            raise AblationError(
                f"{name}: a pass taken up in the middle misses the whole one by {error:.1e} nats (allowed: "
                f"{TOLERANCE:.0e}); this architecture is not supported"
            )
        return error

    def _parts(self, group: replay.Group, prompts: Tensor) -> tuple[Tensor, ...]:
        return prompts.split(max(1, self.tokens // group.ids.shape[1])) if len(prompts) else ()

    def _resumed(self, group: int, part: Tensor) -> contextlib.AbstractContextManager:
        self.distinct.of(self.groups[group].prefixes[part])
        if self.layer == 0:
            return contextlib.nullcontext()
        return replay.from_layer(self.clean.decomposition, self.layer, self.hidden[group][part])


class _Removed:
    """Last position, clean run: the share of what all feed-forward layers write that is taken away."""

    def __init__(self, run: CleanRun):
        self.trace = run.trace
        decomposition = run.decomposition
        whole = (
            sum(run.trace.write(site) for site in sites).double().square().sum(1)
            for layer in range(len(run.trace.layers))
            if (sites := decomposition.at(layer, *_FFN_KINDS))
        )
        self.whole = sum(whole)
        self.routed = {
            layer: {expert: (rows, slots) for expert, rows, slots in routed_rows(record.index)}
            for layer, record in enumerate(run.trace.layers)
            if record.index is not None
        }

    def share(self, targets: list[Target]) -> np.ndarray | None:
        """Sum over layers of |what the targets write|^2 / sum over layers of |F|^2: [P]; None for heads."""
        if targets[0].kind == "attn":
            return None
        written: dict[int, Tensor] = {}
        for target in targets:
            site = target.site(self.trace.decomposition)
            coefficients = self.trace.layers[target.layer].coefficients[site.name]
            total = written.setdefault(target.layer, torch.zeros_like(self.trace.final))
            neurons = torch.as_tensor(target.neurons, device=total.device)
            values = site._stored(target.expert).detach()[neurons].float()
            if target.kind == "routed":
                if target.expert in self.routed[target.layer]:
                    rows, slots = self.routed[target.layer][target.expert]
                    total.index_add_(0, rows, coefficients[rows, slots][:, neurons] @ values)
            else:
                total += coefficients[:, neurons] @ values
        removed = sum(total.double().square().sum(1) for total in written.values())
        return (removed / self.whole).cpu().numpy()


def _clean_rows(run: CleanRun) -> pl.DataFrame:
    logits, target = run.trace.logits, run.target
    rank = 1 + (logits > logits.gather(1, target[:, None])).sum(1)
    nothing = selection.Intervention("none", "0", None, "none", None, None, np.empty(0), np.arange(len(target)))
    log_prob = logits.double().log_softmax(-1).gather(1, target[:, None])[:, 0]
    return _rows(run, nothing, log_prob.cpu().numpy(), rank.cpu().numpy(), np.zeros(len(target)))


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


def _matched(plan: selection.Plan) -> dict[str, float]:
    if not plan.matched:
        return {}
    means = pl.DataFrame(plan.matched).group_by("size", "ranking").agg(pl.col("share").mean()).sort("size", "ranking")
    return {f"{size} {ranking}": share for size, ranking, share in means.rows()}
