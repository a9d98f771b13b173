"""To which kind the leading FFN neurons belong, routed or shared, and how far prompts and relations share them.

Tables of one checkpoint of a model with shared experts in, tables out. A kind's share is told beside what chance gives
it: shared neurons are few of all, but many of those active in a prompt. Overlaps stand beside those of random sets of
the same sizes, drawn from what could be in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import polars as pl
from scipy.sparse import csr_array

from moescope import neuron_sets, tables
from moescope.errors import MoescopeError
from moescope.expert_importance import Routed, by_expert, leading_neurons
from moescope.sample import Prompts
from moescope.statistics import ZERO, percentiles
from moescope.steps import step_name

#: Sizes of the sets whose kinds are counted.
TOPS = (100, 200, 300)
#: Leading neurons whose overlap is told, and the kinds to which they are narrowed.
OVERLAPPING, OVERLAP_KINDS = 100, ("all", "shared", "routed")
#: Shared neurons that are listed.
LISTED = 5
_NEURON = ["layer", "kind", "expert", "neuron"]


class NeuronTypesError(MoescopeError):
    """Tables from which the kinds of neurons cannot be told."""


def neuron_types(
    step: int | None,
    top_active: pl.DataFrame,
    ffn_neurons: pl.DataFrame,
    active_sums: pl.DataFrame,
    prompts: pl.DataFrame,
    seed: int = 0,
) -> pl.DataFrame:
    """The share of each kind among the leading 100, 200 and 300 FFN neurons, as the table ``neuron_types``.

    ``ranking``: ``per_prompt``, the n highest by signed LPI of every prompt, shares averaged over prompts, with a
    bootstrap interval over subjects; ``aggregate``, the n with the largest mean LPI over the prompts (no interval).
    Where fewer than n are active, all of them. Of all prompts and of each relation. ``chance_active`` is the share of
    the kind among the active FFN neurons of a prompt, averaged over the scope's prompts; ``chance_all`` that among all.
    Both are null of ``aggregate``, where chance is neither: a mean over prompts favours what is active in all of them.
    Raises NeuronTypesError where the model has no shared neurons or tables do not fit together.
    """
    neurons = _sorted(ffn_neurons, step)
    kinds = neurons["kind"].unique().sort().to_list()
    number = {kind: int((neurons["kind"] == kind).sum()) for kind in kinds}
    known = Prompts(prompts, seed)
    shares = known.place(_shares_by_prompt(top_active, kinds), step)
    placed = shares.join(_active(active_sums, number), on="prompt_id", how="left").sort("prompt_id")
    _refuse_gaps(placed, prompts, step)
    columns = [f"{top} {kind}" for top in TOPS for kind in kinds] + [f"active {kind}" for kind in kinds]
    stratum = placed["_stratum"].to_numpy()
    sums = known.bootstrap.resample(placed.select(columns).to_numpy(), placed["_subject"].to_numpy(), stratum)
    rows = []
    for scope, name, members in known.scopes(set(stratum.tolist())):
        if scope == "category":
            continue
        estimate = sums.micro(members)
        found = {
            column: (float(value), *map(tables.number, ends))
            for column, value, *ends in zip(columns, estimate.value, estimate.low, estimate.high, strict=True)
        }
        for top in TOPS:
            leaders = neurons["kind"].gather(_leading(neurons, name, top, step))
            for kind in kinds:
                chances = found[f"active {kind}"][0], number[kind] / len(neurons)
                rows.append((step, top, "per_prompt", scope, name, kind, *found[f"{top} {kind}"], *chances))
                share = (leaders == kind).mean()
                rows.append((step, top, "aggregate", scope, name, kind, share, None, None, None, None))
    return tables.of_rows(rows, "neuron_types")


def _sorted(ffn_neurons: pl.DataFrame, step: int | None) -> pl.DataFrame:
    """The neurons in the order of their ids, by which ties are broken; refuses a model without shared ones."""
    if "shared" not in ffn_neurons["kind"]:
        found = f"step {step_name(step)}: ffn_neurons has no shared neurons"
        raise NeuronTypesError(f"{found}; kinds are told of models with shared experts, leave this one out")
    return ffn_neurons.sort(_NEURON, nulls_last=True)


def _shares_by_prompt(top_active: pl.DataFrame, kinds: Sequence[str]) -> pl.DataFrame:
    """One row per prompt: ``<top> <kind>``, the kind's share of its leading neurons, and how many are ``listed``."""
    leaders = leading_neurons(top_active, max(TOPS))
    shares = (
        (pl.col("kind") == kind).filter(pl.col("rank") <= top).mean().alias(f"{top} {kind}")
        for top in TOPS
        for kind in kinds
    )
    return leaders.group_by("prompt_id").agg(pl.len().alias("listed"), *shares)


def _active(active_sums: pl.DataFrame, number: dict[str, int]) -> pl.DataFrame:
    """One row per prompt: ``active`` FFN neurons, and ``active <kind>``, the kind's share of them."""
    always = {kind: pl.lit(count) for kind, count in number.items() if kind != "routed"}
    counts = always | ({"routed": pl.col("active") - sum(always.values())} if "routed" in number else {})
    shares = ((count / pl.col("active")).alias(f"active {kind}") for kind, count in counts.items())
    return active_sums.filter(pl.col("component") == "ffn").select("prompt_id", "active", *shares)


def _refuse_gaps(placed: pl.DataFrame, prompts: pl.DataFrame, step: int | None) -> None:
    """Every prompt has its row, with its active neurons and as many leading ones as are asked for."""
    if len(placed) < len(prompts):
        raise _torn(step, "top_active does not hold every prompt of prompts.parquet")
    if placed["active"].null_count():
        raise _torn(step, "active_sums does not hold every prompt of prompts.parquet")
    if (placed["listed"] < placed["active"].clip(upper_bound=max(TOPS))).any():
        raise _torn(step, "top_active lists too few neurons of a prompt")


def _leading(neurons: pl.DataFrame, relation: str | None, number: int, step: int | None) -> np.ndarray:
    """Rows of the neurons with the largest mean LPI on the prompts of a relation (null: all), of those active there."""
    end = "" if relation is None else f"_{relation}"
    if not {f"importance{end}", f"active{end}"} <= {*neurons.columns}:
        raise _torn(step, f"ffn_neurons knows nothing of relation {relation}")
    active = np.flatnonzero(neurons[f"active{end}"].to_numpy() > 0)
    return active[neuron_sets.largest(neurons[f"importance{end}"].to_numpy()[active], number)]


def shared_neurons(
    step: int | None, ffn_neurons: pl.DataFrame, relations: Sequence[str], width: int | None
) -> pl.DataFrame:
    """The five shared neurons with the largest positive mean LPI of every relation, as the table ``shared_neurons``.

    ``within``: ``all``, or ``first_I``, only those whose index is below ``width``, the number of neurons of a routed
    expert (null: unknown, no such rows). Ties go to the earlier layer and neuron. Raises NeuronTypesError where the
    model has no shared neurons or a relation is not known.
    """
    shared = _sorted(ffn_neurons, step).filter(pl.col("kind") == "shared")
    parts = {"all": shared} if width is None else {"all": shared, "first_I": shared.filter(pl.col("neuron") < width)}
    rows = []
    for within, neurons in parts.items():
        for relation in relations:
            best = neurons[_leading(neurons, relation, LISTED, step)]
            best = best.select("layer", "neuron", importance=f"importance_{relation}")
            best = best.filter(pl.col("importance") > ZERO).sort("importance", descending=True, maintain_order=True)
            rows += [(step, relation, within, rank, *row) for rank, row in enumerate(best.iter_rows(), start=1)]
    return tables.of_rows(rows, "shared_neurons")


def neuron_overlap(
    step: int | None,
    top_active: pl.DataFrame,
    ffn_neurons: pl.DataFrame,
    routing: pl.DataFrame,
    prompts: pl.DataFrame,
    seed: int = 0,
) -> pl.DataFrame:
    """Jaccard overlap of sets of the 100 leading FFN neurons, as the table ``neuron_overlap``.

    Kind ``all`` takes the sets whole, ``shared`` and ``routed`` their members of that kind. ``relations``: the sets of
    the largest mean LPI of two relations; no interval; chance is the J at which random sets of these sizes out of all
    neurons of the kind have as many in common as expected. ``samples``: the sets by signed LPI of two prompts of a
    relation, mean over all pairs of different subjects; ``strangers``: the same over all pairs of different subjects
    and relations. Their chance draws either set at random among the neurons of the kind active in its prompt: |A| |B|
    active in both / (active in A x active in B) in common, J of which is averaged over the same pairs. Pairs of two
    empty sets do not count; where no pair is left there is no value. Intervals resample subjects, a pair counting the
    product of how often its two subjects are drawn; three subjects at least. Raises NeuronTypesError where the model
    has no shared neurons, ImportanceError where routing is incomplete.
    """
    neurons = _sorted(ffn_neurons, step)
    known = Prompts(prompts, seed)
    pairs = _Pairs(known, prompts, top_active, neurons, by_expert(routing, prompts), step)
    leading = {name: _leading(neurons, name, OVERLAPPING, step) for name in known.relations}
    rows = []
    for kind in OVERLAP_KINDS:
        inside = np.ones(len(neurons), dtype=bool) if kind == "all" else (neurons["kind"] == kind).to_numpy()
        for one, other in combinations(known.relations, 2):
            a, b = (leading[name][inside[leading[name]]] for name in (one, other))
            value = neuron_sets.jaccard(a, b)
            common = len(a) * len(b) / inside.sum() if inside.any() else 0.0
            chance = neuron_sets.jaccard_of_overlap(common, len(a), len(b))
            numbers = (tables.number(value), None, None, tables.number(chance))
            rows.append((step, kind, "relations", one, other, *numbers))
        for comparison, relation, numbers in pairs.means(kind):
            rows.append((step, kind, comparison, relation, None, *map(tables.number, numbers)))
    return tables.of_rows(rows, "neuron_overlap")


class _Pairs:
    """The leading and the active neurons of the prompts, prompt by prompt, and their overlaps pair by pair, [P, P]."""

    def __init__(
        self,
        known: Prompts,
        prompts: pl.DataFrame,
        top_active: pl.DataFrame,
        neurons: pl.DataFrame,
        routed: Routed,
        step: int | None,
    ) -> None:
        placed = known.place(prompts.select("prompt_id"), step).sort("prompt_id")
        self._known = known
        self._subject, self._stratum = placed["_subject"].to_numpy(), placed["_stratum"].to_numpy()
        leaders = leading_neurons(top_active, OVERLAPPING)
        if not leaders["prompt_id"].unique().sort().equals(placed["prompt_id"]):
            raise _torn(step, "top_active does not hold the prompts of prompts.parquet")
        self._prompt = leaders["prompt_id"].rank("dense").to_numpy().astype(np.int64) - 1
        self._neuron = leaders.select(pl.struct(_NEURON).rank("dense")).to_series().to_numpy().astype(np.int64) - 1
        self._kind = leaders["kind"].to_numpy()
        counts = dict(neurons.group_by("kind").len().iter_rows())
        self._always = {kind: counts.get(kind, 0) for kind in ("shared", "dense")}
        sizes = neurons.filter(pl.col("kind") == "routed").group_by("layer", "expert").len()
        sizes = routed.experts.join(sizes, on=["layer", "expert"], how="left", maintain_order="left")["len"]
        if sizes.null_count():
            raise _torn(step, "routing names experts that ffn_neurons does not know")
        used = routed.used.astype(np.float64)
        self._routed_in_both = (used * sizes.to_numpy()) @ used.T

    def means(self, kind: str) -> Iterator[tuple[str, str | None, tuple[float, float, float, float]]]:
        """(comparison, relation, (mean J, low, high, chance)) within every relation, and between relations."""
        jaccard, chance = self._overlaps(kind)
        apart = (self._subject[:, None] != self._subject) & ~np.isnan(jaccard)
        same = self._stratum[:, None] == self._stratum
        for stratum, relation in enumerate(self._known.relations):
            own = np.flatnonzero(self._stratum == stratum)
            yield "samples", relation, self._mean(own, jaccard, chance, apart & same)
        yield "strangers", None, self._mean(np.arange(len(jaccard)), jaccard, chance, apart & ~same)

    def _overlaps(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """J of the members of a kind of two prompts, and what chance gives, [P, P]; NaN where both have none."""
        chosen = np.ones(len(self._kind), dtype=bool) if kind == "all" else self._kind == kind
        at = self._prompt[chosen], self._neuron[chosen]
        shape = len(self._subject), self._neuron.max() + 1
        members = csr_array((np.ones(len(at[0])), at), shape=shape)
        in_both = {"all": self._routed_in_both + sum(self._always.values()), "routed": self._routed_in_both}
        active = in_both.get(kind, np.full(self._routed_in_both.shape, float(self._always["shared"])))
        own, sizes = np.diag(active), members.sum(axis=1)
        # without active neurons of the kind there are no members either
        draws = np.outer(sizes / np.maximum(own, 1.0), sizes / np.maximum(own, 1.0)) * active
        return _jaccards((members @ members.T).toarray(), sizes), _jaccards(draws, sizes)

    def _mean(
        self, prompts: np.ndarray, jaccard: np.ndarray, chance: np.ndarray, pairs: np.ndarray
    ) -> tuple[float, float, float, float]:
        """Mean of J over the pairs among these prompts, the ends of its interval, and the mean chance."""
        square = np.ix_(prompts, prompts)
        pairs = pairs[square]
        subjects, place = np.unique(self._subject[prompts], return_inverse=True)
        of_subject = np.zeros((len(subjects), len(prompts)))
        of_subject[place, np.arange(len(prompts))] = 1.0
        summed, expected, number = (
            of_subject @ np.where(pairs, one, 0.0) @ of_subject.T for one in (jaccard[square], chance[square], 1.0)
        )
        counts = self._known.bootstrap.counts[:, subjects]
        totals, sizes = (((counts @ one) * counts).sum(axis=1) for one in (summed, number))
        means = np.divide(totals, sizes, out=np.full(len(sizes), np.nan), where=sizes > 0)
        low, high = np.full(2, np.nan)
        if np.count_nonzero(number.any(axis=1)) > 2:  # of two subjects there is one pair, which cannot vary
            (low,), (high,) = percentiles(means[1:, None])
        mean_chance = expected.sum() / number.sum() if pairs.any() else np.nan
        return means[0], low, high, mean_chance


def _jaccards(common: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """J of sets of these sizes [P] with so many in common [P, P]; NaN of two empty ones."""
    either = sizes[:, None] + sizes - common
    return np.divide(common, either, out=np.full(common.shape, np.nan), where=either > 0)


def _torn(step: int | None, what: str) -> NeuronTypesError:
    return NeuronTypesError(f"step {step_name(step)}: {what}; delete the results of this step and run again")
