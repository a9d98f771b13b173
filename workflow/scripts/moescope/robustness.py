"""What breaks when the most important parts are taken away, and whether the score foretells it.

A relative drop is (clean - ablated) / clean of an averaged metric, never a mean of ratios, and has no value where the
clean HIT@10 is below 0.1. The clean and the ablated average are resampled together, so an interval is that of their
paired difference. Selection and test on the same prompts is optimistic: the cross-fitted rows take each prompt away
with what was selected on the other fold of subjects. A control is one of many that could have been drawn: its interval
holds the variance between subjects and that between draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.special import ndtri, stdtrit
from scipy.stats import rankdata

from moescope import tables
from moescope.errors import MoescopeError
from moescope.sample import Checkpoint, Prompts
from moescope.selection import RANKINGS, SIZES, size_of
from moescope.statistics import LEVEL, hits, percentiles, reciprocal_ranks
from moescope.steps import step_name

#: The first two are relative drops, the last a difference in nats.
METRICS = ("hit@10", "mrr", "log_prob")
#: Clean HIT@10 below which a relative drop says nothing.
FLOOR = 0.1
#: Control draws from which a p value is given: the smallest that can reach 0.05.
SEEDS_FOR_P = 19
#: More than this share of all heads is no small part.
LARGE = Fraction(1, 10)
SCORES = ("lpi", "gradient", "magnitude")
_ENTRY = ["site", "size", "ranking", "control", "crossfit"]
_NEURON = ["layer", "kind", "expert", "neuron"]


class RobustnessError(MoescopeError):
    """Ablation tables that are incomplete or do not fit the prompts."""


class Entry(NamedTuple):
    """What tells one ablation result of a checkpoint from another."""

    site: str
    size: str
    ranking: str | None
    control: str
    crossfit: bool


def units(site: str, size: str, heads: int, neurons: int) -> int:
    """How many heads or FFN neurons a size is, of a model with so many of either."""
    return size_of(size, heads if site == "head" else neurons)


def degenerate(site: str, size: str, heads: int) -> bool:
    """Whether a size of heads is more than 10% of all, or the same number as a size named before it."""
    if site != "head":
        return False
    number, names = size_of(size, heads), SIZES["head"]
    return number > LARGE * heads or number in {size_of(one, heads) for one in names[: names.index(size)]}


def robustness(
    checkpoints: Iterable[Checkpoint], prompts: pl.DataFrame, heads: int, neurons: int, seed: int = 0
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The tables ``robustness`` (by step) and ``robustness_summary`` (over steps) of one series.

    ``checkpoints`` carry ``ablations`` and are read one at a time; ``heads`` and ``neurons`` are the numbers of all
    heads and FFN neurons of the model. ``value`` is the relative drop of HIT@10 and MRR (null where clean HIT@10 of the
    scope and average is below 0.1) and the loss of mean log-probability in nats. Cross-fitted rows hold both folds,
    each prompt once. A control is averaged over its n seeds first; ``spread`` is the standard deviation of ``value``
    between them, and its interval adds t(n - 1) spread / sqrt(n) to the distances of the subject bootstrap, in
    quadrature on each side (one seed: no interval). Its ``p`` (from 19 seeds on) is (1 + the seeds whose drop is at
    least the selection's) / (1 + n). Random sets serve all selections; their p refers to the first there
    is of signed, abs, per_relation, cross-fitted before in-sample. ``seeds`` is 0 for a selection. A control that was
    not drawn for both folds (too few other heads in a layer) has no row.
    Over steps: ``mean``, and ``slope`` per decade of training steps (least squares on log10 of the step, steps > 0, two
    or more), ``spread`` that of the seeds' own means or slopes; ``checkpoints`` counts the steps used, ``unavailable``
    all others (slope: that are > 0), those where a control was not drawn too. Raises RobustnessError where the clean
    run or a tested prompt is missing, or where a control has other seeds than at another step.
    """
    known = Prompts(prompts, seed)
    rows, courses, steps = [], {}, []
    for step, tokens, frame in checkpoints:
        steps.append(step)
        clean, tested = _tested(known.place(frame, step), step)
        for result in _results(known, clean, tested):
            key = (*result.entry, *result.scope)
            courses.setdefault(key, _Course(result)).add(step, result)
            site, size = result.entry[:2]
            number, flag = units(site, size, heads, neurons), degenerate(site, size, heads)
            for metric, estimate, p in zip(METRICS, result.estimates, result.p, strict=True):
                numbers = (*map(tables.number, estimate), result.removed, p)
                rows.append((step, tokens, *key, metric, *numbers, number, result.prompts, result.seeds, flag))
    summary = [
        (*key, metric, statistic, *numbers, degenerate(*key[:2], heads))
        for key, course in courses.items()
        for metric, statistic, numbers in course.summaries(len(steps), sum(map(bool, steps)))
    ]
    return tables.of_rows(rows, "robustness"), tables.of_rows(summary, "robustness_summary")


class _Clean(NamedTuple):
    """The clean run: values [prompts, metrics], the subject and the relation of each prompt."""

    values: np.ndarray
    subject: np.ndarray
    stratum: np.ndarray


class _Tested(NamedTuple):
    """One entry, prompts as in the clean run: values [seeds, prompts, metrics], removed [seeds, prompts]."""

    values: np.ndarray
    removed: np.ndarray


class _Result(NamedTuple):
    """One entry in one scope: drops in the sample and the draws [1 + draws, metrics], and by metric its numbers.

    ``scope`` is (scope, name, average); ``by_seed`` [seeds, metrics] are the drops of the seeds of a control, none of a
    selection; ``estimates`` [metrics, 6] are clean, ablated, value, low, high and spread.
    """

    entry: Entry
    scope: tuple[str, str | None, str]
    drop: np.ndarray
    by_seed: np.ndarray
    estimates: np.ndarray
    removed: float | None
    p: list[float | None]
    prompts: int

    @property
    def seeds(self) -> int:
        return len(self.by_seed)


def _tested(placed: pl.DataFrame, step: int | None) -> tuple[_Clean, dict[Entry, _Tested]]:
    """The clean run and every intervention of one checkpoint, prompts in one order."""
    placed = placed.with_columns(crossfit=pl.col("fold").is_not_null()).sort(*_ENTRY, "seed", "prompt_id")
    clean = placed.filter(pl.col("site") == "none")
    if clean.is_empty():
        found = f"step {step_name(step)}: ablations.parquet has no clean run"
        raise RobustnessError(f"{found}; delete the file and run again")
    runs = placed.filter(pl.col("site") != "none").with_columns(_rows=pl.len().over(*_ENTRY, "seed"))
    _refuse_gaps(runs, clean, step)
    runs = runs.filter(pl.col("_rows") == len(clean))  # matched controls of one fold alone are gone
    values = measured(runs).reshape(-1, len(clean), len(METRICS))
    removed = runs["removed"].cast(pl.Float64).fill_null(np.nan).to_numpy().reshape(-1, len(clean))
    places: dict[Entry, list[int]] = {}
    for place, row in enumerate(runs.select(*_ENTRY, "seed").unique(maintain_order=True).iter_rows()):
        places.setdefault(Entry(*row[:-1]), []).append(place)
    tested = {entry: _Tested(values[at], removed[at]) for entry, at in places.items()}
    return _Clean(measured(clean), clean["_subject"].to_numpy(), clean["_stratum"].to_numpy()), tested


def _refuse_gaps(runs: pl.DataFrame, clean: pl.DataFrame, step: int | None) -> None:
    """Every run tests each prompt of the clean run once; a matched control may lack some, nothing else may."""
    faults = {
        "a prompt that the clean run does not have": runs.join(clean, on="prompt_id", how="anti"),
        "a prompt twice": runs.filter(pl.struct(*_ENTRY, "seed", "prompt_id").is_duplicated()),
        "not all prompts": runs.filter(pl.col("control") != "matched", pl.col("_rows") < len(clean)),
    }
    for fault, found in faults.items():
        if len(found):
            site, size, control = found.select("site", "size", "control").row(0)
            what = f"step {step_name(step)}: {site} {size} (control {control}) tests {fault}"
            raise RobustnessError(f"{what}; delete ablations.parquet of this step and run again")


def measured(frame: pl.DataFrame) -> np.ndarray:
    """HIT@10, reciprocal rank and log-probability of every row, [rows, metrics]."""
    rank = frame["rank"].to_numpy()
    return np.column_stack([hits(rank, 10), reciprocal_ranks(rank), frame["log_prob"].to_numpy()])


def _results(known: Prompts, clean: _Clean, tested: Mapping[Entry, _Tested]) -> Iterator[_Result]:
    """Every entry in every scope and average."""
    columns = np.column_stack([clean.values, *(one.values.mean(axis=0) for one in tested.values())])
    sums = known.bootstrap.resample(columns, clean.subject, clean.stratum)
    for scope, name, members in known.scopes(set(clean.stratum.tolist())):
        for average in ("micro",) if scope == "relation" else ("micro", "macro"):
            draws = sums.draws(average, members)
            draws = draws.reshape(len(draws), -1, len(METRICS))
            drop = drops(draws[:, :1], draws[:, 1:])
            factor = usable(draws[0, 0, 0])
            drop[..., :2] *= factor
            if sums.subjects(members) < 2:
                drop[1:] = np.nan
            ends = np.stack([end.reshape(drop.shape[1:]) for end in percentiles(drop[1:].reshape(len(drop) - 1, -1))])
            weights = weights_of(clean.stratum, members, average)
            by_seed = {e: drops(weights @ clean.values, weights @ one.values) for e, one in tested.items()}
            for each in by_seed.values():
                each[:, :2] *= factor
            for i, (entry, one) in enumerate(tested.items()):
                seeds = by_seed[entry][: 0 if entry.control == "none" else None]
                estimated = estimates_of(drop[0, i], *ends[:, i], seeds)
                estimates = np.column_stack([draws[0, 0], draws[0, 1 + i], estimated])
                p = [value if np.isfinite(drop[0, i, m]) else None for m, value in enumerate(_p(entry, by_seed))]
                removed = tables.number(one.removed.mean(axis=0)[weights > 0] @ weights[weights > 0])
                scoped = (scope, name, average)
                yield _Result(entry, scoped, drop[:, i], seeds, estimates, removed, p, sums.prompts(members))


def estimates_of(
    value: np.ndarray, low: np.ndarray, high: np.ndarray, seeds: np.ndarray, one_more: bool = False
) -> np.ndarray:
    """Value, low, high and spread, [metrics, 4], of a result and those of its ``seeds`` [n, metrics] (selection: none).

    Subjects and draws of a control are independent, so that the distances which either gives to an end add in
    quadrature: t(n - 1) spread sqrt(1 / n), for the mean over all draws of the control; for ``one_more``, what is held
    against the control as if it were another draw of it, t(n - 1) spread sqrt(1 / n + 1).
    """
    n, spread = len(seeds), np.full_like(value, np.nan)
    if n > 0:
        spread = seeds.std(axis=0, ddof=1) if n > 1 else spread
        reach = stdtrit(max(n - 1, 1), 0.5 + LEVEL / 2) * spread * np.sqrt(1 / n + one_more)
        low, high = value - np.hypot(value - low, reach), value + np.hypot(high - value, reach)
    return np.stack([value, low, high, spread], axis=1)


def usable(hit_10: float) -> float:
    """1 where a clean HIT@10 is large enough for relative drops, else NaN."""
    return 1.0 if hit_10 >= FLOOR - 1e-9 else np.nan  # equal but for rounding


def drops(clean: np.ndarray, ablated: np.ndarray) -> np.ndarray:
    """Drops of averages [..., metrics]: relative for HIT@10 and MRR (NaN where the clean one is 0), in nats for the
    log-probability."""
    drop = clean - ablated
    base = np.broadcast_to(clean[..., :2], drop[..., :2].shape)
    drop[..., :2] = np.divide(drop[..., :2], base, out=np.full(base.shape, np.nan), where=base > 0)
    return drop


def weights_of(stratum: np.ndarray, members: list[int], average: str) -> np.ndarray:
    """What each prompt counts in an average over these relations, [prompts]; sums to 1."""
    inside = stratum[:, None] == np.array(members)
    each = inside / inside.sum(axis=0) / len(members) if average == "macro" else inside / inside.sum()
    return each.sum(axis=1)


def _p(entry: Entry, by_seed: Mapping[Entry, np.ndarray]) -> list[float | None]:
    """How often a control does at least what the selection does, by metric; null but for controls of 19 seeds."""
    against = [entry._replace(control="none")]
    if entry.control == "random":
        against = [against[0]._replace(ranking=one, crossfit=fit) for one in RANKINGS for fit in (True, False)]
    selection = next((by_seed[one][0] for one in against if one in by_seed), None)
    if entry.control == "none" or selection is None or len(by_seed[entry]) < SEEDS_FOR_P:
        return [None] * len(METRICS)
    exceed = (by_seed[entry] >= selection - 1e-9).sum(axis=0)  # equal but for rounding
    return ((1 + exceed) / (1 + len(by_seed[entry]))).tolist()


class _Course:
    """Sums over checkpoints of one drop, sample, draws and seeds, from which its mean and slope follow.

    Per metric, as one may have a value at a step where another has none; draws without a value make the sums of that
    draw NaN, which leaves it out of the interval.
    """

    def __init__(self, first: _Result) -> None:
        self._draws, self._seeds = len(first.drop), first.seeds
        shape = self._draws + self._seeds, len(METRICS)
        self._all, self._dated = _Sums(shape), _Sums(shape)

    def add(self, step: int | None, result: _Result) -> None:
        if result.seeds != self._seeds:
            site, size, _, control, _ = result.entry
            what = (
                f"step {step_name(step)}: {site} {size} (control {control}) has {result.seeds} seeds, not {self._seeds}"
            )
            raise RobustnessError(f"{what}; delete ablations.parquet of this step and run again")
        drop = np.concatenate([result.drop, result.by_seed])
        self._all.add(0.0, drop)
        if step:
            self._dated.add(np.log10(step), drop)

    def summaries(self, steps: int, dated: int) -> Iterator[tuple[str, str, tuple]]:
        """(metric, statistic, (value, low, high, spread, checkpoints used, checkpoints without a value)).

        ``steps``: how many there are in all, ``dated``: how many are not step 0.
        """
        for statistic, sums, found, asked in (
            ("mean", self._all, self._all.mean(), steps),
            ("slope", self._dated, self._dated.slope(), dated),
        ):
            estimates = estimates_of(found[0], *percentiles(found[1 : self._draws]), found[self._draws :])
            for m, metric in enumerate(METRICS):
                used = int(sums.used[m])
                yield metric, statistic, (*map(tables.number, estimates[m]), used, asked - used)


class _Sums:
    """Sums of x, x^2 [metrics], y and x y [1 + draws, metrics] over the checkpoints with a y."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.used, self._x, self._xx = np.zeros((3, shape[1]))
        self._y, self._xy = np.zeros((2, *shape))

    def add(self, x: float, y: np.ndarray) -> None:
        there = ~np.isnan(y[0])
        self.used += there
        self._x += x * there
        self._xx += x * x * there
        self._y[:, there] += y[:, there]
        self._xy[:, there] += x * y[:, there]

    def mean(self) -> np.ndarray:
        """Mean of y, [1 + draws, metrics]; NaN without a checkpoint."""
        return np.divide(self._y, self.used, out=np.full(self._y.shape, np.nan), where=self.used > 0)

    def slope(self) -> np.ndarray:
        """Least-squares slope of y on x; NaN with fewer than two checkpoints."""
        spread = self.used * self._xx - self._x**2
        rise = self.used * self._xy - self._x * self._y
        return np.divide(rise, spread, out=np.full(rise.shape, np.nan), where=self.used > 1)


def score_faithfulness(checkpoints: Iterable[Checkpoint], prompts: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Rank correlation of scores of single neurons with what zeroing each does, as the table ``score_faithfulness``.

    ``checkpoints`` carry ``faithfulness_prompts``. Effect and scores of a neuron are means over the prompts in which it
    is active; Spearman's rho runs over the sampled neurons, of all kinds and of each. In a draw of subjects the means
    are computed anew; a neuron without a prompt in it drops out of that draw. The interval is rho -+ 1.96 standard
    errors of the draws on Fisher's z scale: means over fewer different prompts are noisier, so that rho is smaller in
    most draws and a percentile interval can exclude its own estimate. ``random`` is a score without meaning, a new one
    in every draw: its interval is the central 95% of chance, its value the mean.
    """
    known = Prompts(prompts, seed)
    rows = []
    for step, tokens, frame in checkpoints:
        placed = known.place(frame, step)
        kinds, means = _neuron_means(known, placed)
        random = np.random.default_rng([seed, len(kinds)]).random(means.shape[:2])
        random[np.isnan(means[..., 0])] = np.nan
        enough = placed["_subject"].n_unique() > 1
        for kind in ("all", *sorted(set(kinds))):
            chosen = np.ones(len(kinds), dtype=bool) if kind == "all" else np.array(kinds) == kind
            effect, *scores = (_ranks(x[:, chosen]) for x in (*np.moveaxis(means, -1, 0), random))
            for name, score in zip((*SCORES, "random"), scores, strict=True):
                rho = _pearson(effect, score)
                ends = _chance(rho) if name == "random" else _fisher_interval(rho, enough)
                rows.append((step, tokens, kind, name, *map(tables.number, ends), int(chosen.sum())))
    return tables.of_rows(rows, "score_faithfulness")


def _chance(rho: np.ndarray) -> tuple[float, float, float]:
    """Mean and central 95% of the correlations [1 + draws] with scores that mean nothing."""
    if np.isnan(rho[1:]).all():
        return np.nan, np.nan, np.nan
    (low,), (high,) = percentiles(rho[1:, None])
    return np.nanmean(rho[1:]), low, high


def _fisher_interval(rho: np.ndarray, enough: bool) -> tuple[float, float, float]:
    """A correlation and its interval from those in the sample and the draws [1 + draws]; ends NaN without subjects."""
    z = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))
    if not enough or np.isnan(z[0]) or np.isnan(z[1:]).all():
        return rho[0], np.nan, np.nan
    reach = ndtri(0.5 + LEVEL / 2) * np.nanstd(z[1:], ddof=1)
    return rho[0], min(rho[0], np.tanh(z[0] - reach)), max(rho[0], np.tanh(z[0] + reach))


def _neuron_means(known: Prompts, placed: pl.DataFrame) -> tuple[list[str], np.ndarray]:
    """Kinds of the neurons, and means of effect and scores [1 + draws, neurons, 4], NaN where a draw has no prompt."""
    neurons = placed.select(_NEURON).unique().sort(_NEURON)
    numbered = neurons.with_row_index("_place")
    place = placed.join(numbered, on=_NEURON, how="left", nulls_equal=True, maintain_order="left")["_place"].to_numpy()
    subjects = known.bootstrap.counts.shape[1]
    totals, sizes = np.zeros((subjects, len(neurons), 4)), np.zeros((subjects, len(neurons)))
    at = placed["_subject"].to_numpy(), place
    np.add.at(totals, at, placed.select("effect", *SCORES).cast(pl.Float64).to_numpy())
    np.add.at(sizes, at, 1.0)
    drawn = (known.bootstrap.counts @ totals.reshape(subjects, -1)).reshape(-1, *totals.shape[1:])
    number = (known.bootstrap.counts @ sizes)[..., None]
    means = np.divide(drawn, number, out=np.full(drawn.shape, np.nan), where=number > 0)
    return neurons["kind"].to_list(), means


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, equal values sharing the mean of theirs; NaN stays NaN and takes no rank."""
    missing = np.isnan(values)
    return np.where(missing, np.nan, rankdata(np.where(missing, np.inf, values), axis=-1))


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation over the last axis of what is not NaN (in both alike); NaN where one of the two is constant."""
    there = np.maximum((~np.isnan(x)).sum(axis=-1, keepdims=True), 1)
    x, y = (np.nan_to_num(one - np.nansum(one, axis=-1, keepdims=True) / there) for one in (x, y))
    size = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return np.divide((x * y).sum(axis=-1), size, out=np.full(size.shape, np.nan), where=size > 0)
