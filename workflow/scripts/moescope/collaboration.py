"""What a mixture of experts loses when its routers choose from fewer experts, or when its leading experts are blocked.

A drop is that of an averaged metric (relative for HIT@10 and MRR, in nats for the log-probability), never a mean of
ratios; clean and changed average are resampled together. Experts that are found and blocked on the same prompts do more
than others by selection alone, so that controls are held against the cross-fitted blocking: each prompt loses the
experts which were found on the other fold of subjects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from moescope import tables
from moescope.errors import MoescopeError
from moescope.robustness import METRICS, SEEDS_FOR_P, drops, estimates_of, measured, usable, weights_of
from moescope.sample import Prompts
from moescope.selection import FOLDS
from moescope.statistics import percentiles
from moescope.steps import step_name

#: Results of two passes that differ by less are those of the same computation (nats).
SAME = 1e-4
_BUDGET = ("mode", "size", "weights", "shared")


class CollaborationError(MoescopeError):
    """Interventions that are incomplete or do not fit the prompts."""


class Clean(NamedTuple):
    """The clean run, by prompt: its ID, values [prompts, metrics], subject, relation (a number) and fold."""

    prompts: pl.Series
    values: np.ndarray
    subject: np.ndarray
    stratum: np.ndarray
    fold: np.ndarray

    @classmethod
    def of(cls, known: Prompts, interventions: pl.DataFrame, prompts: pl.DataFrame, step: int | None) -> Clean:
        """The clean run among the interventions of a checkpoint, sorted by prompt; CollaborationError without one."""
        placed = known.place(interventions.filter(pl.col("experiment") == "clean"), step).sort("prompt_id")
        if placed.is_empty():
            found = f"step {step_name(step)}: expert_interventions.parquet has no clean run"
            raise CollaborationError(f"{found}; delete the file and run again")
        groups = placed.join(prompts.select("prompt_id", "group"), on="prompt_id", maintain_order="left")["group"]
        folds = groups.replace_strict({group: fold for fold, members in FOLDS.items() for group in members})
        columns = (placed["_subject"], placed["_stratum"], folds)
        return cls(placed["prompt_id"], measured(placed), *(column.to_numpy() for column in columns))


class _Blocked(NamedTuple):
    """What tells one blocking of a checkpoint from another."""

    semantics: str
    size: int
    control: str
    crossfit: bool


class _Run(NamedTuple):
    """One entry: values [seeds, prompts, metrics], prompts as in the clean run; the relations it has all prompts of."""

    values: np.ndarray
    covered: set[int]


class _Scope(NamedTuple):
    """Means over the prompts of some relations, ``members``: in the sample and in every draw (NaN with fewer than two
    subjects), ``draws`` [1 + draws, clean run and entries, metrics]; ``weights``: what each prompt counts."""

    names: tuple[str, str | None, str]
    draws: np.ndarray
    weights: np.ndarray
    members: list[int]
    prompts: int

    def drops(self, clean: np.ndarray, after: np.ndarray) -> np.ndarray:
        """``robustness.drops``; NaN for HIT@10 and MRR where the clean HIT@10 of the scope is below 0.1."""
        found = drops(clean, after)
        found[..., :2] *= usable(self.draws[0, 0, 0])
        return found


def budgets(step: int | None, interventions: pl.DataFrame, prompts: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """HIT@10, MRR and log-probability under every routing budget of one checkpoint, as the table ``budgets``.

    ``value`` is the mean under the budget, ``drop`` what is lost of the clean one: relative for HIT@10 and MRR (null
    where the clean HIT@10 is below 0.1; draws in which it is 0 do not count for the interval), in nats for the
    log-probability.
    Averages run over all prompts (micro) or relations (macro), and over the prompts of each relation. Raises
    CollaborationError where there is no clean run or a budget does not have each prompt once.
    """
    known = Prompts(prompts, seed)
    clean = Clean.of(known, interventions, prompts, step)
    chosen = interventions.filter(pl.col("experiment") == "budget")
    runs = {entry: _run(frame, entry, clean, known, step) for entry, frame in _entries(chosen, _BUDGET)}
    rows = []
    for scope in _scopes(known, clean, runs.values()):
        after = scope.draws[:, 1:]
        means, lost = _intervals(after), _intervals(scope.drops(scope.draws[:, :1], after))
        for i, entry in enumerate(runs):
            for m, metric in enumerate(METRICS):
                numbers = map(tables.number, (*means[:, i, m], *lost[:, i, m]))
                rows.append((step, *entry, *scope.names, metric, *numbers, scope.prompts))
    return tables.of_rows(rows, "budgets")


def blocking(step: int | None, interventions: pl.DataFrame, prompts: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """What is lost by blocking the leading experts of every relation, and by the controls, as the table ``blocking``.

    ``value`` is the drop of a mean (as in ``budgets``) over the prompts of a scope; cross-fitted rows hold both folds,
    each prompt once. A control is averaged over its n seeds; ``spread`` is the standard deviation of ``value`` between
    them, and its interval adds t(n - 1) spread / sqrt(n) to the distances of the subject bootstrap, in quadrature on
    each side (one seed: no interval). ``excess`` is the drop of the cross-fitted selection minus that of the control,
    on the same prompts and draws; its interval is that of another draw of the control, t(n - 1) spread sqrt(1 + 1 / n):
    whether the selection is one of them. ``p`` (from 19 seeds on) is (1 + the seeds whose drop is at least that
    selection's) / (1 + n). Seeds that ran the same, because few experts are alike, count once. Excess and p are null
    of a selection, and where the scope has no cross-fitted one. ``seeds`` is n, 0 for a selection. What was not to be
    had for a relation (a matched control: for one of its folds) has neither a row of that relation nor one of scope
    ``all``. Raises CollaborationError where there is no clean run, or where a blocking does not have each prompt of a
    relation once.
    """
    known = Prompts(prompts, seed)
    clean = Clean.of(known, interventions, prompts, step)
    chosen = interventions.with_columns(crossfit=pl.col("fold").is_not_null()).filter(experiment="blocking")
    entries = _entries(chosen, _Blocked._fields)
    runs = {_Blocked(*entry): _run(frame, entry, clean, known, step) for entry, frame in entries}
    rows = []
    for scope in _scopes(known, clean, runs.values()):
        drop = scope.drops(scope.draws[:, :1], scope.draws[:, 1:])
        before, after = scope.draws[0, 0], scope.draws[0, 1:]
        here = {entry: i for i, (entry, run) in enumerate(runs.items()) if run.covered.issuperset(scope.members)}
        for entry, i in here.items():
            ahead, p = np.full_like(drop[:, i], np.nan), [None] * len(METRICS)
            seeds = np.empty((0, len(METRICS)))
            if entry.control != "none":
                values = runs[entry].values[_apart(runs[entry].values, clean.values, scope.weights > 0)]
                seeds = scope.drops(scope.weights @ clean.values, scope.weights @ values)
                selection = here.get(entry._replace(control="none", crossfit=True))
                if selection is not None:
                    ahead, p = drop[:, selection] - drop[:, i], _p(drop[0, selection], seeds)
            value = estimates_of(*_intervals(drop[:, i]), seeds)
            excess = estimates_of(*_intervals(ahead), seeds, one_more=True)
            for m, metric in enumerate(METRICS):
                numbers = before[m], after[i, m], *value[m, :3], *excess[m, :3], value[m, 3]
                numbers = (*map(tables.number, numbers), p[m], scope.prompts, len(seeds))
                rows.append((step, *entry, *scope.names, metric, *numbers))
    return tables.of_rows(rows, "blocking")


def _entries(chosen: pl.DataFrame, names: Sequence[str]) -> Iterable[tuple[tuple, pl.DataFrame]]:
    """The rows of every entry, in the order of their names."""
    return chosen.sort(names).partition_by(names, as_dict=True, maintain_order=True).items()


def _run(frame: pl.DataFrame, entry: tuple, clean: Clean, known: Prompts, step: int | None) -> _Run:
    """The rows of one entry laid over the clean run; refuses what does not have each prompt once, or in a wrong fold.

    Of the blocking of leading experts and of its matched control relations may be absent, of which one that the control
    has for one fold alone counts as absent; nothing else may lack a prompt.
    """
    experiment, control = frame.select("experiment", "control").row(0)

    def refusal(fault: str) -> CollaborationError:
        what = f"step {step_name(step)}: {experiment} {' '.join(map(str, entry))} tests {fault}"
        return CollaborationError(f"{what}; delete expert_interventions.parquet of this step and run again")

    values, times = _laid_over(frame, clean, refusal)
    covered, may_lack = set(), experiment == "blocking" and control != "random"
    for stratum in np.unique(clean.stratum).tolist():
        inside = clean.stratum == stratum
        folds = [times[:, inside & (clean.fold == fold)] for fold in np.unique(clean.fold[inside])]
        tested = [bool(fold.any()) for fold in folds]
        if may_lack and not (all(tested) if control == "matched" else any(tested)):
            continue
        if not all(fold.all() for fold in folds):
            raise refusal(f"not all prompts of {known.relations[stratum]}")
        covered.add(stratum)
    return _Run(values, covered)


def _laid_over(
    frame: pl.DataFrame, clean: Clean, refusal: Callable[[str], CollaborationError]
) -> tuple[np.ndarray, np.ndarray]:
    """Values [seeds, prompts, metrics], prompts as in the clean run, and how often each was tested, at most once."""
    numbers = pl.Series(range(len(clean.prompts)), dtype=pl.Int64)
    place = frame["prompt_id"].replace_strict(clean.prompts, numbers, default=None)
    if place.null_count():
        raise refusal("a prompt that the clean run does not have")
    place = place.to_numpy()
    own = pl.Series(clean.fold[place])
    if (frame["fold"].cast(own.dtype).fill_null(own) != own).any():
        raise refusal("a prompt of the other fold")
    seed = frame["seed"].rank("dense").fill_null(1).to_numpy().astype(np.int64) - 1
    times = np.zeros((int(seed.max()) + 1, len(clean.prompts)), dtype=np.int64)
    np.add.at(times, (seed, place), 1)
    if (times > 1).any():
        raise refusal("a prompt twice")
    values = np.zeros((*times.shape, len(METRICS)))
    values[seed, place] = measured(frame)
    return values, times


def _scopes(known: Prompts, clean: Clean, runs: Iterable[_Run]) -> Iterator[_Scope]:
    """All prompts, micro and macro, and every relation; entries as they come, controls averaged over their seeds."""
    columns = np.column_stack([clean.values, *(run.values.mean(axis=0) for run in runs)])
    sums = known.bootstrap.resample(columns, clean.subject, clean.stratum)
    for scope, name, members in known.scopes(set(clean.stratum.tolist())):
        for average in {"all": ("micro", "macro"), "relation": ("micro",)}.get(scope, ()):
            draws = sums.draws(average, members).reshape(len(known.bootstrap.counts), -1, len(METRICS))
            if sums.subjects(members) < 2:
                draws[1:] = np.nan
            weights = weights_of(clean.stratum, members, average)
            yield _Scope((scope, name, average), draws, weights, members, sums.prompts(members))


def _intervals(draws: np.ndarray) -> np.ndarray:
    """Value, low and high, [3, ...], of what is given in the sample (row 0) and in every draw, [1 + draws, ...]."""
    ends = percentiles(draws[1:].reshape(len(draws) - 1, -1))
    return np.stack([draws[0], *(end.reshape(draws.shape[1:]) for end in ends)])


def _apart(values: np.ndarray, clean: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Which seeds of a control, values [seeds, prompts, metrics], are draws of their own: the first of those that ran
    the same inside a scope, and all that changed nothing there, but for what passes round (``SAME``)."""
    runs = (values[:, inside] - clean[inside]).reshape(len(values), -1)
    _, first = np.unique(np.round(runs / SAME), axis=0, return_index=True)
    return np.union1d(first, np.flatnonzero((np.abs(runs) < SAME).all(axis=1)))


def _p(selection: np.ndarray, seeds: np.ndarray) -> list[float | None]:
    """How often a control does at least what the selection does, by metric; null with few seeds or without a drop."""
    if len(seeds) < SEEDS_FOR_P:
        return [None] * len(METRICS)
    exceed = (seeds >= selection - 1e-9).sum(axis=0)  # equal but for rounding
    return [tables.number(p) for p in np.where(np.isnan(selection), np.nan, (1 + exceed) / (1 + len(seeds)))]
