"""What an attention head does to an expert: without the head, with the expert forced, and by integrated gradients.

A pair of a head and an expert was found on one fold of subjects and is tested on the other, or was named (fold null:
tested on all prompts). A head whose r with its expert is negative should turn it down, so that without the head the
expert gains: pairs of either sign stand apart. Beside what the pair does stands what others do in its place: other
heads of the layer that are taken away, other experts of the layer that are forced, a head among as many of its layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from moescope import tables
from moescope.collaboration import Clean
from moescope.errors import MoescopeError
from moescope.pairs import Pair
from moescope.robustness import estimates_of, usable
from moescope.sample import Prompts
from moescope.statistics import percentiles, reciprocal_ranks
from moescope.steps import step_name

#: Share of the clean MRR that a head must take away before one can ask how much of it comes back.
LEAST_LOSS = 0.01
#: Share of draws without an answer above which there is no interval: those that are left would look too sure.
UNDEFINED = 0.025


class CausalityError(MoescopeError):
    """Interventions on pairs that are incomplete."""


def causality(
    step: int | None,
    interventions: pl.DataFrame,
    gates: pl.DataFrame,
    gradients: pl.DataFrame,
    associations: pl.DataFrame,
    prompts: pl.DataFrame,
    seed: int = 0,
) -> pl.DataFrame:
    """What the head of every pair does to its expert and to the answers, at one checkpoint, as the table ``causality``.

    ``sign`` of a pair is that of its r in ``associations`` of the same checkpoint: found on the other fold than the one
    it is tested on; of a named pair on all prompts, null where it is not listed there. Every quantity is made of means
    over the prompts of the fold, never a mean of ratios over prompts:

    - ``gate_drop``: 1 - suppressed / clean of the probability that the router of ``gate_layer`` gives to the experts a
      prompt is routed to when clean, without the pair's head; null: the mean over these layers, the head's own (whose
      router comes after it) and all later ones. ``expert_gate_drop``: the same of the pair's expert alone (a pair of
      negative sign should have one below 0);
    - ``mrr_drop``: 1 - suppressed / clean of the MRR;
    - ``forced_mrr``: forced / clean, the expert forced while the head is away; ``recovery``: (forced - suppressed) /
      (clean - suppressed), null where suppression takes away less than 1% of the clean MRR (or adds to it), without an
      interval where it does so in more than 2.5% of the draws; all three null where the clean HIT@10 is below 0.1;
    - ``gradient_share``: the pair's head's share of the positive attribution of all heads of its layer, summed over
      prompts, of a pair of negative sign that of their negative attribution; ``gradient_share_with_rest``: of theirs
      and the positive probability that is left without them; ``gradient_gap``: mean absolute completeness gap over the
      mean probability of the expert (attributions and rest minus the gap).

    Controls: other heads (``gate_drop``, ``expert_gate_drop``, ``mrr_drop``) or other experts (``forced_mrr``,
    ``recovery``) of the layer, averaged over their n seeds, their intervals with t(n - 1) spread / sqrt(n) added in
    quadrature (one seed: no interval); of gradient shares what the mean head of the layer has (of ``gradient_share``
    1 / number of heads, without an interval). ``excess`` is value minus control on the same prompts and draws, the pair
    held against the control as if it were another draw of it: t(n - 1) spread sqrt(1 / n + 1).

    Rows without a pair are over all pairs and folds (``sign`` null) and over those of each sign; pairs without a sign
    are in the first alone, where they count as positive. They are means of those that have a number, in the sample and
    in every draw; their seeds' part is that of the means of the seeds which all of them have. Two quantities differ:
    ``recovery`` is the ratio of the means of what comes back and of what is lost, over all pairs, also those that lose
    little or nothing, with the limits above for their mean loss; and over all pairs ``expert_gate_drop`` is the mean of
    sign times value (control, excess), that is in the direction of r, as pairs of both signs would cancel. ``prompts``
    counts different prompts. No interval with fewer than two subjects (in any pair of a mean). Without pairs the table
    is empty. Raises CausalityError where a pair lacks prompts of its fold or has one twice, or was found on a fold
    where ``associations`` does not list it; CollaborationError where there is no clean run.
    """
    known = Prompts(prompts, seed)
    clean = Clean.of(known, interventions, prompts, step)
    heads_off = interventions.filter(pl.col("experiment") == "suppression")
    forced = interventions.filter(pl.col("experiment") == "forcing")
    signs, rows, all_pairs = _signs(associations), [], {}
    for mode, fold in heads_off.select("mode", "fold").unique().sort("mode", "fold").iter_rows():
        pair = Pair.of(mode)
        tested = _Tested.of(known, clean, fold, f"step {step_name(step)}: {mode}")
        runs = (one.filter(pl.col("mode") == mode, pl.col("fold").eq_missing(fold)) for one in (heads_off, forced))
        sign = signs.get((pair, fold))
        if sign is None and fold is not None:
            raise tested.refusal("is not listed", "associations")
        found = _answers(tested, *runs) | _gates(tested, gates, pair) | _gradients(tested, gradients, pair, sign)
        for (quantity, gate_layer), effect in found.items():
            numbers = *_numbers(effect), int(tested.inside.sum())
            rows.append((step, *pair, fold, sign, quantity, gate_layer, *numbers))
            if gate_layer is None:
                all_pairs.setdefault(quantity, []).append(_OfPair(sign, effect, tested.inside))
    for quantity, those in all_pairs.items():
        for sign in (None, *sorted({one.sign for one in those} - {None})):
            pooled, number = _pool(those, sign, quantity)
            rows.append((step, *(None,) * 5, sign, quantity, None, *_numbers(pooled), number))
    return tables.of_rows(rows, "causality")


def _signs(associations: pl.DataFrame) -> dict[tuple[Pair, int | None], str]:
    """Of every pair and fold "-" where its r is negative, else "+"."""
    found = associations.filter(pl.col("relation").is_null()).select(*Pair._fields, "fold", "r")
    return {(Pair(*pair), fold): "-" if r < 0 else "+" for *pair, fold, r in found.iter_rows()}


class _Tested(NamedTuple):
    """The prompts that a pair is tested on: which of the clean run, IDs, reciprocal ranks and subjects; ``usable``:
    1, or NaN where too few are known for relative drops; and what is tested, for messages."""

    known: Prompts
    inside: np.ndarray
    prompts: pl.Series
    reciprocal_rank: np.ndarray
    subject: np.ndarray
    usable: float
    name: str

    @classmethod
    def of(cls, known: Prompts, clean: Clean, fold: int | None, name: str) -> _Tested:
        inside = np.full(len(clean.fold), True) if fold is None else clean.fold == fold
        hit, reciprocal_rank = clean.values[inside][:, :2].T
        which = known, inside, clean.prompts.filter(inside)
        return cls(*which, reciprocal_rank, clean.subject[inside], usable(hit.mean()), name)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Means of [prompts, ...] in the sample and in every draw, [1 + draws, ...]; draws NaN without two subjects."""
        sums = self.known.bootstrap.resample(values.reshape(len(values), -1), self.subject)
        draws = sums.draws()
        if sums.subjects() < 2:
            draws[1:] = np.nan
        return draws.reshape(-1, *values.shape[1:])

    def only(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows of these prompts."""
        return frame.filter(pl.col("prompt_id").is_in(self.prompts.implode()))

    def grid(self, frame: pl.DataFrame, axes: list[list[str]], values: list[str], file: str) -> np.ndarray:
        """Columns of rows of these prompts, [*axes, prompts, values], each axis over all that its columns hold, sorted,
        nulls last; CausalityError where another prompt has a row, or a cell none or two."""
        shape = [*(frame.select(axis).n_unique() for axis in axes), len(self.prompts)]
        keys = [*(name for axis in axes for name in axis), "prompt_id"]
        whole = len(frame) == frame.select(keys).n_unique() == np.prod(shape)
        if not whole or not frame["prompt_id"].unique().sort().equals(self.prompts):
            raise self.refusal("does not have each prompt once", file)
        values_of = frame.sort(keys, nulls_last=True).select(pl.col(values).cast(pl.Float64))
        return values_of.to_numpy().reshape(*shape, len(values))

    def refusal(self, fault: str, file: str) -> CausalityError:
        return CausalityError(f"{self.name} {fault} in {file}.parquet; delete the file and run again")


class _Effect(NamedTuple):
    """Value, control and excess in the sample and in every draw, ``draws`` [1 + draws, 3], NaN where not available; the
    control by seed [seeds]; and of a recovery the MRR that it is made of."""

    draws: np.ndarray
    seeds: np.ndarray
    parts: np.ndarray | None = None

    @classmethod
    def against(cls, value: np.ndarray, control: np.ndarray) -> _Effect:
        """A value [1 + draws] and the same of the seeds of a control [1 + draws, seeds]; there may be none."""
        mean = control.mean(axis=1) if control.shape[1] else np.full_like(value, np.nan)
        return cls(np.stack([value, mean, value - mean], axis=1), control[0])

    @classmethod
    def against_chance(cls, value: np.ndarray, chance: float) -> _Effect:
        control = np.full_like(value, np.nan)
        control[0] = chance
        return cls(np.stack([value, control, value - chance], axis=1), np.empty(0))

    @classmethod
    def against_mean(cls, value: np.ndarray, mean: np.ndarray) -> _Effect:
        """A value and what the mean unit of its kind has, both [1 + draws]."""
        return cls(np.stack([value, mean, value - mean], axis=1), np.empty(0))

    @classmethod
    def of_recovery(cls, parts: np.ndarray) -> _Effect:
        """Of MRR [1 + draws, 3 + seeds]: the clean one, what of it is lost, and what comes back with the pair's expert
        and with those of the seeds."""
        clean, lost, back = np.split(parts, [1, 2], axis=1)
        recovery = np.where(lost >= LEAST_LOSS * clean, _ratio(back, lost), np.nan)
        recovery[1:, np.isnan(recovery).mean(axis=0) > UNDEFINED] = np.nan
        return cls.against(recovery[:, 0], recovery[:, 1:])._replace(parts=parts)

    def times(self, direction: int) -> _Effect:
        return self._replace(draws=direction * self.draws, seeds=direction * self.seeds)


class _OfPair(NamedTuple):
    """What a pair of this sign does, and which prompts it was tested on."""

    sign: str | None
    effect: _Effect
    inside: np.ndarray


def _by_run(tested: _Tested, frame: pl.DataFrame, axes: list[list[str]], values: list[str], file: str) -> np.ndarray:
    """A grid whose first axis is the pair's own run, then the seeds of the control."""
    if "none" not in frame["control"]:
        raise tested.refusal("is not there itself", file)
    return tested.grid(frame, [["control", "seed"], *axes], values, file)  # none comes before random


def _answers(tested: _Tested, suppressed: pl.DataFrame, forced: pl.DataFrame) -> dict[tuple, _Effect]:
    """What becomes of the MRR, without the head and with the expert forced."""
    file = "expert_interventions"
    ranks = [_by_run(tested, runs, [], ["rank"], file)[..., 0].T for runs in (suppressed, forced)]
    columns = np.column_stack([tested.reciprocal_rank, *map(reciprocal_ranks, ranks)])
    clean, without, with_expert = np.split(tested.means(columns), [1, 1 + ranks[0].shape[1]], axis=1)
    found = {"mrr_drop": 1 - _ratio(without, clean), "forced_mrr": _ratio(with_expert, clean)}
    found = {quantity: tested.usable * of for quantity, of in found.items()}
    suppressed = without[:, :1]
    parts = tested.usable * np.column_stack([clean, clean - suppressed, with_expert - suppressed])
    effects = {quantity: _Effect.against(of[:, 0], of[:, 1:]) for quantity, of in found.items()}
    return {(name, None): effect for name, effect in (effects | {"recovery": _Effect.of_recovery(parts)}).items()}


def _gates(tested: _Tested, gates: pl.DataFrame, pair: Pair) -> dict[tuple, _Effect]:
    """What becomes of the probability that the later routers give, without the head."""
    of_head = tested.only(gates).filter(pl.col("layer") == pair.head_layer, pl.col("head") == pair.head)
    top = of_head.filter(pl.col("expert").is_null())
    expert = of_head.filter(pl.col("expert") == pair.expert, pl.col("gate_layer") == pair.layer)
    layers = top["gate_layer"].unique().sort().to_list()
    drop, own = (_gate_drop(tested, frame) for frame in (top, expert))
    found = {("gate_drop", layer): drop[..., i] for i, layer in enumerate(layers)}
    found |= {("gate_drop", None): drop.mean(axis=-1), ("expert_gate_drop", None): own[..., 0]}
    return {name: _Effect.against(each[:, 0], each[:, 1:]) for name, each in found.items()}


def _gate_drop(tested: _Tested, gates: pl.DataFrame) -> np.ndarray:
    """The share of the probability that is lost, [1 + draws, pair and seeds, gate layers]."""
    grid = _by_run(tested, gates, [["gate_layer"]], ["clean", "suppressed"], "gates")
    means = tested.means(np.moveaxis(grid, 2, 0))
    return 1 - _ratio(means[..., 1], means[..., 0])


def _gradients(tested: _Tested, gradients: pl.DataFrame, pair: Pair, sign: str | None) -> dict[tuple, _Effect]:
    """Where the probability of the expert comes from, by integrated gradients; or what takes from it."""
    of_pair = (pl.col(name) == number for name, number in pair._asdict().items() if name != "head")
    frame = tested.only(gradients).filter(*of_pair)
    *heads, rest = frame["head"].unique().sort(nulls_last=True).to_list() or [None]
    if rest is not None or pair.head not in heads:
        raise tested.refusal("is not there itself, or without the rest", "gradients")
    grid = tested.grid(frame, [["head"]], ["attribution", "gap"], "gradients")
    attribution, gap = grid[..., 0], grid[0, :, 1]
    of_heads, rest = np.maximum(_direction(sign) * attribution[:-1], 0), np.maximum(attribution[-1], 0)
    own, total = of_heads[heads.index(pair.head)], of_heads.sum(axis=0)
    columns = np.column_stack([own, total, total + rest, np.abs(gap), attribution.sum(axis=0) - gap])
    own, total, with_rest, gap, probability = tested.means(columns).T
    nothing = np.empty((len(own), 0))
    return {
        ("gradient_share", None): _Effect.against_chance(_ratio(own, total), 1 / len(heads)),
        ("gradient_share_with_rest", None): _Effect.against_mean(
            _ratio(own, with_rest), _ratio(total, with_rest) / len(heads)
        ),
        ("gradient_gap", None): _Effect.against(_ratio(gap, probability), nothing),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is not above 0."""
    shape = np.broadcast_shapes(part.shape, whole.shape)
    return np.divide(part, whole, out=np.full(shape, np.nan), where=np.broadcast_to(whole > 0, shape))


def _direction(sign: str | None) -> int:
    """The way in which a head should move the probability of its expert."""
    return -1 if sign == "-" else 1


def _pool(pairs: Sequence[_OfPair], sign: str | None, quantity: str) -> tuple[_Effect, int]:
    """What the pairs of a sign do (null: all pairs), and on how many prompts."""
    pairs = [one for one in pairs if sign in (None, one.sign)]
    in_direction = quantity == "expert_gate_drop" and sign is None
    effects = [one.effect.times(_direction(one.sign)) if in_direction else one.effect for one in pairs]
    if quantity == "recovery":
        columns = min(effect.parts.shape[1] for effect in effects)
        values = np.stack([effect.parts[:, :columns] for effect in effects])
        pooled = _Effect.of_recovery(_mean(values))
    else:
        values = np.stack([effect.draws for effect in effects])
        pooled = _Effect(_mean(values), _mean_of_seeds(effects))
    used = [one.inside for one, value in zip(pairs, values[:, 0, 0], strict=True) if np.isfinite(value)]
    return pooled, int(np.any(used, axis=0).sum()) if used else 0


def _mean(each: np.ndarray) -> np.ndarray:
    """The mean of those that have a number, in the sample and in every draw; [pairs, 1 + draws, columns]."""
    used = ~np.isnan(each[:, 0])
    there = ~np.isnan(each) & used[:, None]
    number = there.sum(axis=0)
    mean = np.divide(np.where(there, each, 0).sum(axis=0), number, out=np.full(number.shape, np.nan), where=number > 0)
    unsure = (used & ~there[:, 1:].any(axis=1)).any(axis=0)  # one of them has no interval
    mean[1:, unsure] = np.nan
    return mean


def _mean_of_seeds(effects: Sequence[_Effect]) -> np.ndarray:
    """The mean control of those that have one, by seed [seeds that all of them have]."""
    seeds = [effect.seeds for effect in effects if np.isfinite(effect.draws[0, 1])]
    in_all = min(map(len, seeds), default=0)
    return np.mean([one[:in_all] for one in seeds], axis=0) if in_all else np.empty(0)


def _numbers(effect: _Effect) -> Iterable[float | None]:
    """Value, control and excess, each with its interval."""
    low, high = percentiles(effect.draws[1:])
    no_seeds, seeds = np.empty((0, 1)), effect.seeds[:, None]
    each = [
        estimates_of(effect.draws[0, [i]], low[[i]], high[[i]], *of_seeds)
        for i, of_seeds in enumerate([(no_seeds,), (seeds,), (seeds, True)])
    ]
    return map(tables.number, np.concatenate(each)[:, :3].ravel())
