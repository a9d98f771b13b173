"""Stability and concentration within a prompt, among the neurons that are active in it (N3).

A mixture of experts leaves most neurons out of a prompt, so that 1% of all neurons is a larger part of those at work
than in a dense model. Here shares and overlaps are of active neurons, prompt by prompt, at exactly 1% of them: the last
neuron of a top set counts in part, as few active neurons rounded up to whole ones would be more than 1%. Checkpoints
are read one at a time; of each, numbers and scores of the listed neurons are kept until the next one is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import polars as pl

from moescope import tables
from moescope.dynamics import Checkpoint, DynamicsError
from moescope.neuron_sets import TOP, largest, leading, positive
from moescope.statistics import Resamples, SubjectBootstrap

#: ``top_active`` is complete down to this share of a prompt's active neurons by |LPI|.
LISTED = 2 * TOP
METRICS = ("positive_share", "effective_share", "jaccard")
_FFN_IDS = ["layer", "kind", "expert", "neuron"]
_SUMS = ["active", "sum_positive", "sum_positive_log"]
#: A neuron's number in binary: its layer, 2 digits of kind, 12 of expert or head, 20 of neuron; and all of them.
_LAYER, _KIND, _PART, _NUMBER = 34, 32, 20, 43
_KINDS = {kind: code for code, kind in enumerate(tables.KINDS)}


def prompt_dynamics(checkpoints: Iterable[Checkpoint], prompts: pl.DataFrame) -> pl.DataFrame:
    """Per prompt, component and step, as the table ``prompt_dynamics``; reads ``top_active``, ``active_sums``,
    ``ffn_neurons`` (how many neurons an expert has) and, of mixtures of experts, ``routing``.

    ``positive_share``: what the top 1% of the active neurons by signed LPI hold of the positive LPI. With S = sum LPI+,
    ``effective_share`` = exp(H) / active, H = log S - (sum LPI+ log LPI+) / S: the number of equal neurons that would
    be as spread out, as a share of the active ones. Both null in a prompt without positive LPI. ``jaccard``: (weighted)
    J of the two top 1% by |LPI| among the neurons active at this step and at the one before; null where a list ends
    before that top 1% does. Without ``top_active`` only the effective share is known. Raises DynamicsError where tables
    do not fit.
    """
    ids = prompts["prompt_id"].sort()
    before, frames = None, []
    for checkpoint in checkpoints:
        after = _read(checkpoint, ids, before)
        for component, shares in after.shares.items():
            unknown = np.full(len(ids), np.nan)
            overlap = unknown if before is None else _jaccards(before, after, component)
            frames.append(
                pl.DataFrame({"prompt_id": ids, **shares, "jaccard": overlap}).with_columns(
                    component=pl.lit(component),
                    step_from=pl.lit(None if before is None else before.step, dtype=pl.Int64),
                    step=pl.lit(after.step, dtype=pl.Int64),
                )
            )
        before = after
    if not frames:
        raise DynamicsError("prompt_dynamics: there is no checkpoint to summarise")
    return tables.check(pl.concat(frames).with_columns(pl.selectors.float().fill_nan(None)), "prompt_dynamics")


class PromptMean(NamedTuple):
    """A metric of a ``prompt_dynamics`` table at one step: its sums in the sample and in every draw of subjects (None
    where no prompt has a value), how many prompts have one, and how many do not."""

    component: str
    metric: str
    step_from: int | None
    step: int
    sums: Resamples | None
    prompts: int
    left_out: int


def means(
    frame: pl.DataFrame, prompts: pl.DataFrame, seed: int = 0, missing: float | None = None
) -> Iterator[PromptMean]:
    """Every metric at every step; the draws are the same for all of them, and for all series with these subjects.

    ``jaccard`` begins with the second step. ``missing``: what a prompt without a value counts as; by default such
    prompts are left out of the mean. They are counted either way.
    """
    bootstrap = SubjectBootstrap.draw(prompts["subject"], seed)
    places = prompts.select(
        "prompt_id",
        subject=pl.Series(bootstrap.positions(prompts["subject"].to_list())),
        stratum=pl.col("relation").rank("dense").cast(pl.Int64) - 1,
    )
    placed = frame.join(places, on="prompt_id", how="left", maintain_order="left")
    if placed["subject"].null_count():
        stranger = placed.filter(pl.col("subject").is_null())["prompt_id"][0]
        raise DynamicsError(f"prompt {stranger} is not in prompts.parquet; delete the results of its series")
    for (component, step_from, step), rows in placed.group_by(["component", "step_from", "step"], maintain_order=True):
        for metric in METRICS if step_from is not None else METRICS[:-1]:
            left_out, sums = rows[metric].null_count(), None
            used = rows.with_columns(pl.col(metric).fill_null(pl.lit(missing, pl.Float64))).drop_nulls(metric)
            if len(used):
                values, subject, stratum = (used[name].to_numpy() for name in (metric, "subject", "stratum"))
                sums = bootstrap.resample(values[:, None], subject, stratum)
            yield PromptMean(component, metric, step_from, step, sums, len(rows) - left_out, left_out)


def summary(frame: pl.DataFrame, prompts: pl.DataFrame, tokens: dict[int, int | None], seed: int = 0) -> pl.DataFrame:
    """Means over prompts of a ``prompt_dynamics`` table, as rows of ``neuron_dynamics`` of population ``prompt``.

    Micro and macro averages, with bootstrap intervals over subjects; ``prompts`` were used, ``left_out`` had no value.
    ``tokens``: seen by each step, as far as known.
    """
    rows = []
    for mean in means(frame, prompts, seed):
        for average in ("micro", "macro"):
            ends = dict.fromkeys(("value", "low", "high"), math.nan)
            if mean.sums is not None:
                estimate = getattr(mean.sums, average)()
                ends = {end: float(getattr(estimate, end)[0]) for end in ends}
            name = {"population": "prompt", "average": average, "tokens": tokens.get(mean.step)}
            rows.append(name | {key: value for key, value in mean._asdict().items() if key != "sums"} | ends)
    table = pl.DataFrame(rows, schema=tables.SCHEMAS["neuron_dynamics"].columns)
    return tables.check(table.with_columns(pl.selectors.float().fill_nan(None)), "neuron_dynamics")


@dataclass(frozen=True)
class _Listed:
    """The neurons of a component's largest |LPI|, prompt after prompt, [rows] each: the prompt's place, the neuron's
    number, the expert it belongs to (-1: always active), and |LPI|."""

    prompt: np.ndarray
    neuron: np.ndarray
    expert: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class _State:
    """What is kept of a checkpoint until the next one is done."""

    step: int
    experts: _Experts
    #: which experts a prompt is routed to, [prompts, experts]
    routed: np.ndarray
    #: number of active neurons in every prompt, by component [prompts]
    active: dict[str, np.ndarray]
    shares: dict[str, dict[str, np.ndarray]]
    listed: dict[str, _Listed | None]


@dataclass(frozen=True)
class _Experts:
    """The routed experts of a model, numbered by layer and expert: the number of each, how many neurons each has, and
    how many other FFN neurons there are, all of them always active."""

    number: dict[tuple[int, int], int]
    neurons: np.ndarray
    others: int

    @classmethod
    def of(cls, ids: pl.DataFrame) -> _Experts:
        routed = ids.filter(kind="routed").group_by("layer", "expert").len().sort("layer", "expert")
        number = {(layer, expert): i for i, (layer, expert, _) in enumerate(routed.iter_rows())}
        neurons = routed["len"].to_numpy().astype(np.int64)
        return cls(number, neurons, len(ids) - int(neurons.sum()))

    def fit(self, other: _Experts) -> bool:
        """Whether two checkpoints have the same experts."""
        same = self.number == other.number and self.others == other.others
        return same and np.array_equal(self.neurons, other.neurons)

    def numbers(self, frame: pl.DataFrame) -> np.ndarray:
        """The number of every row's (layer, expert)."""
        if frame.is_empty():
            return np.empty(0, dtype=np.int64)
        table = np.full(np.max(list(self.number), axis=0) + 1, -1)
        table[tuple(np.array(list(self.number)).T)] = list(self.number.values())
        return table[frame["layer"].to_numpy(), frame["expert"].to_numpy()]


def _read(checkpoint: Checkpoint, ids: pl.Series, before: _State | None) -> _State:
    step, _, table = checkpoint
    experts = _Experts.of(table("ffn_neurons", _FFN_IDS))
    if before is not None and not experts.fit(before.experts):
        raise DynamicsError(
            f"steps {before.step} and {step}: not the same ffn neurons; "
            "a series holds checkpoints of one model, take the others out"
        )
    routed = np.zeros((len(ids), len(experts.neurons)), dtype=bool)
    if experts.number:
        slots = table("routing", ["prompt_id", "layer", "expert", "slot"]).filter(pl.col("slot").is_not_null())
        routed[_prompts(slots, ids, step), experts.numbers(slots)] = True
    sums = table("active_sums", ["prompt_id", "component", *_SUMS])
    listed = _top_active(table, ids, step)
    state = _State(step, experts, routed, {}, {}, {})
    for component in tables.COMPONENTS:
        own = sums.filter(component=component)
        if not own["prompt_id"].equals(ids):
            raise _torn(step, "active_sums does not hold the prompts of prompts.parquet")
        active, total, log = (own[name].to_numpy() for name in _SUMS)
        if component == "ffn" and not np.array_equal(active, experts.others + routed @ experts.neurons):
            raise _torn(step, "routing and active_sums differ in which neurons are active")
        held, state.listed[component] = np.full(len(ids), np.nan), None
        if listed is not None:
            held, state.listed[component] = _lists(listed.pop(component), experts, active, step)
        some = total > 0
        safe = np.where(some, total, 1.0)
        effective = np.exp(np.log(safe) - log / safe) / active
        shares = {"positive_share": held / safe, "effective_share": effective}
        state.active[component] = active
        state.shares[component] = {name: np.where(some, share, np.nan) for name, share in shares.items()}
    return state


def _top_active(table: Callable, ids: pl.Series, step: int) -> dict[str, pl.DataFrame] | None:
    """The rows of ``top_active`` by component, words replaced by numbers: ``prompt`` and ``kind``.

    Words are read before numbers, and let go: rows are many, and names take most of their memory.
    """
    names = table("top_active", ["prompt_id"])
    if names is None:
        return None
    words = {"prompt": pl.Series(_prompts(names, ids, step), dtype=pl.Int32)}
    del names
    named = table("top_active", ["component", "kind"])
    words["kind"] = named["kind"].replace_strict(_KINDS, default=0, return_dtype=pl.Int8)
    components = {component: named["component"] == component for component in tables.COMPONENTS}
    del named
    rows = table("top_active", ["layer", "expert", "head", "neuron", "lpi"]).with_columns(**words)
    return {component: rows.filter(own) for component, own in components.items()}


def _lists(rows: pl.DataFrame, experts: _Experts, active: np.ndarray, step: int) -> tuple[np.ndarray, _Listed]:
    """What the top 1% by signed LPI hold of positive LPI, [prompts]; and the complete list by |LPI|."""
    prompt, lpi = rows["prompt"].to_numpy(), rows["lpi"].to_numpy()
    complete = _ceil(LISTED, active)
    if (np.bincount(prompt, minlength=len(active)) < complete).any():
        raise _torn(step, "top_active lists too few neurons of a prompt")
    best, weight = _leading(lpi, prompt, active)
    held = np.bincount(prompt[best], weight * positive(lpi[best].astype(np.float64)), len(active))
    chosen = _largest(np.abs(lpi), prompt, complete)
    parts = {
        _LAYER: pl.col("layer"),
        _KIND: pl.col("kind"),
        _PART: pl.coalesce("expert", "head", 0),
        0: pl.col("neuron"),
    }
    number = rows.select(pl.sum_horizontal(part.cast(pl.Int64) * 2**place for place, part in parts.items()))
    expert, routed = np.full(len(rows), -1), (rows["kind"] == _KINDS["routed"]).to_numpy()
    expert[routed] = experts.numbers(rows.filter(routed))
    return held, _Listed(prompt[chosen], number.to_series().to_numpy()[chosen], expert[chosen], np.abs(lpi[chosen]))


def _jaccards(before: _State, after: _State, component: str) -> np.ndarray:
    """J of the two top 1% by |LPI| among neurons active at both checkpoints, [prompts]; NaN where it is not known."""
    both = before.routed & after.routed
    if component == "ffn":
        active = before.experts.others + both @ before.experts.neurons
    else:
        active = np.minimum(before.active[component], after.active[component])
    whole, known, sets = _ceil(TOP, active), active > 0, []
    for listed in (before.listed[component], after.listed[component]):
        if listed is None:
            return np.full(len(active), np.nan)
        # an expert of -1 reads the last column, which the first condition makes irrelevant
        at_both = (listed.expert < 0) | (both.shape[1] > 0 and both[listed.prompt, listed.expert])
        prompt, neuron = listed.prompt[at_both].astype(np.int64), listed.neuron[at_both]
        known &= np.bincount(prompt, minlength=len(active)) >= whole
        chosen, weight = _leading(listed.size[at_both], prompt, active)
        sets.append(((prompt[chosen] << _NUMBER) + neuron[chosen], weight))
    (one, one_weight), (other, other_weight) = sets
    shared, i, j = np.intersect1d(one, other, assume_unique=True, return_indices=True)
    common = np.bincount(shared >> _NUMBER, np.minimum(one_weight[i], other_weight[j]), len(active))
    either = 2 * float(TOP) * active - common
    return np.divide(common, either, out=np.full(len(active), np.nan), where=known)


def _largest(key: np.ndarray, prompt: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Rows with the largest keys of each prompt, so many, in the order they stand; ``prompt`` ascends."""
    parts = _parts(prompt, sizes)
    return np.concatenate([start + largest(key[start:end], size) for start, end, size in parts])


def _leading(key: np.ndarray, prompt: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with the largest keys of each prompt, exactly 1% of its active neurons, and the weight of each row."""
    tops = [(start, leading(key[start:end], TOP * n)) for start, end, n in _parts(prompt, active)]
    return np.concatenate([start + top.chosen for start, top in tops]), np.concatenate([top.weight for _, top in tops])


def _parts(prompt: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Where the rows of each prompt begin and end, with its number; ``prompt`` ascends."""
    starts = np.searchsorted(prompt, np.arange(len(numbers) + 1)).tolist()
    return zip(starts[:-1], starts[1:], numbers.tolist(), strict=True)


def _ceil(share: Fraction, active: np.ndarray) -> np.ndarray:
    """ceil(share x active), exactly."""
    return -(-active * share.numerator // share.denominator)


def _prompts(frame: pl.DataFrame, ids: pl.Series, step: int) -> np.ndarray:
    """Each row's place among the prompts."""
    try:
        return frame["prompt_id"].cast(pl.Enum(ids)).to_physical().to_numpy().astype(np.int64)
    except pl.exceptions.PolarsError:
        stranger = frame.filter(~pl.col("prompt_id").is_in(ids.implode()))["prompt_id"][0]
        raise _torn(step, f"prompt {stranger} is not in prompts.parquet") from None


def _torn(step: int, what: str) -> DynamicsError:
    return DynamicsError(f"step {step}: {what}; delete this step's results and run again")
