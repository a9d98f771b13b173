"""Which routed experts matter to a relation, by five methods, and how far the methods and the paper name the same ones.

Tables of one checkpoint in, tables out. Experts that are tested on prompts on which they were found look better than
they are: beside the lists of all prompts there are those of either fold of subjects, found on the other one. All
measures are taken at the last position.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.stats import hypergeom

from moescope import tables
from moescope.errors import MoescopeError
from moescope.neuron_sets import expected_overlap, positive
from moescope.selection import FOLDS
from moescope.steps import step_name

#: The first is the default, and the likely one of the paper.
METHODS = ("top_neuron_frequency", "top_neuron_count", "routing_frequency", "mean_weight", "summed_lpi")
#: FFN neurons of a prompt, by signed LPI, whose owners the first two methods count.
TOP_NEURONS = 100
#: Experts that are listed, and how many of them are compared.
LISTED, COMPARED = 10, 5
#: What the lists of the paper are called among the methods.
PUBLISHED = "published"
_NEURON = ["layer", "kind", "expert", "neuron"]
_EXPERT = ["layer", "expert"]
_LISTS = ("relation", "model", "rank", *_EXPERT)


class ImportanceError(MoescopeError):
    """Tables from which no importance of experts can be told."""


def expert_importance(routing: pl.DataFrame, top_active: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """The ten leading routed experts of every relation by each of ``METHODS``, as the table ``expert_importance``.

    ``importance`` is, of the relation's prompts: ``top_neuron_frequency``, the number of those in which the expert owns
    one of the prompt's 100 highest FFN neurons by signed LPI (routed, shared and dense ones compete for the 100; where
    fewer are active, all count); ``top_neuron_count``, the number of these neurons over all prompts;
    ``routing_frequency``, the share that is routed to it; ``mean_weight``, its mean router weight; ``summed_lpi``, the
    mean of its LPI, the sum over its neurons (nats). Ties go to the larger LPI, then to the earlier layer and expert.
    Only experts with a positive importance are listed. ``fold`` null: found on all prompts of the relation; else it is
    the fold to be tested, and they are found on the relation's prompts of the other one (no rows where there are none).
    Raises ImportanceError where tables do not hold these prompts, or contradict each other.
    """
    prompts = prompts.sort("prompt_id")
    routed = by_expert(routing, prompts)
    owned = _owned(top_active, prompts, routed)
    relation, group = prompts["relation"].to_numpy(), prompts["group"].to_numpy()
    rows = []
    for name in np.unique(relation):
        for fold in (None, *FOLDS):
            found_on = [g for other, groups in FOLDS.items() if other != fold for g in groups]
            inside = (relation == name) & np.isin(group, found_on)
            if inside.any():
                lists = _leading_experts(routed, owned, inside)
                rows += [(name, method, fold, *leader) for method, leader in lists]
    return tables.of_rows(rows, "expert_importance")


class Routed(NamedTuple):
    """The routed experts, a row (layer, expert) each, and by prompt (ascending prompt_id) and expert, [P, N] each:
    whether it is routed there, its weight and its LPI (nats)."""

    experts: pl.DataFrame
    used: np.ndarray
    weight: np.ndarray
    lpi: np.ndarray


def by_expert(routing: pl.DataFrame, prompts: pl.DataFrame) -> Routed:
    """The table ``routing`` laid out by prompt and expert.

    Raises ImportanceError where it does not hold every expert of every prompt.
    """
    routing = routing.sort("prompt_id", *_EXPERT)
    experts = routing.select(_EXPERT).unique().sort(_EXPERT)
    shape = len(prompts), len(experts)
    if len(routing) != np.prod(shape) or not _same_prompts(routing, prompts):
        raise _torn("routing does not hold every expert of every prompt of prompts.parquet")
    used = routing["slot"].is_not_null().to_numpy()
    weight, lpi = (routing[name].to_numpy().astype(np.float64) for name in ("weight", "lpi"))
    return Routed(experts, *(one.reshape(shape) for one in (used, weight, lpi)))


def experts_of(routing: pl.DataFrame) -> dict[int, int]:
    """How many experts every layer has that routes."""
    return dict(routing.select(_EXPERT).unique().group_by("layer").len().sort("layer").rows())


def leading_neurons(top_active: pl.DataFrame, number: int) -> pl.DataFrame:
    """The FFN neurons with the highest signed LPI of every prompt, ``number`` or all that are listed.

    Rows of ``top_active`` by prompt_id, with ``rank`` from 1; ties go to the first by layer, kind, expert and neuron.
    ``top_active`` lists at least 300 of them.
    """
    ahead = top_active.filter(
        pl.col("component") == "ffn",
        # all ties of the last one are kept, so that few rows need sorting
        pl.col("lpi").rank("min", descending=True).over("prompt_id", "component") <= number,
    )
    order = ["prompt_id", "lpi", *_NEURON]
    ahead = ahead.sort(order, descending=[name == "lpi" for name in order], nulls_last=True)
    return ahead.with_columns(rank=pl.int_range(1, pl.len() + 1).over("prompt_id")).filter(pl.col("rank") <= number)


def _same_prompts(frame: pl.DataFrame, prompts: pl.DataFrame) -> bool:
    return frame["prompt_id"].unique().sort().equals(prompts["prompt_id"].sort())


def _owned(top_active: pl.DataFrame, prompts: pl.DataFrame, routed: Routed) -> np.ndarray:
    """How many of a prompt's highest neurons each routed expert owns, [P, N]."""
    neurons = leading_neurons(top_active, TOP_NEURONS)
    if not _same_prompts(neurons, prompts):
        raise _torn("top_active does not hold the prompts of prompts.parquet")
    owners = neurons.filter(pl.col("kind") == "routed").group_by("prompt_id", *_EXPERT).len()
    owners = owners.join(prompts.select("prompt_id").with_row_index("_prompt"), on="prompt_id", how="left")
    owners = owners.join(routed.experts.with_row_index("_expert"), on=_EXPERT, how="left")
    if owners["_expert"].null_count():
        raise _torn("top_active names experts that routing does not know")
    owned = np.zeros(routed.used.shape, dtype=np.int64)
    owned[owners["_prompt"].to_numpy(), owners["_expert"].to_numpy()] = owners["len"].to_numpy()
    if (owned[~routed.used] > 0).any():
        raise _torn("top_active holds neurons of experts to which the prompt is not routed")
    return owned


def _leading_experts(
    routed: Routed, owned: np.ndarray, inside: np.ndarray
) -> Iterator[tuple[str, tuple[int, int, int, float]]]:
    """(method, (rank, layer, expert, importance)) of the leading experts on the prompts ``inside``, by every method."""
    owned, lpi = owned[inside], routed.lpi[inside]
    importance = {
        "top_neuron_frequency": (owned > 0).sum(axis=0),
        "top_neuron_count": owned.sum(axis=0),
        "routing_frequency": routed.used[inside].mean(axis=0),
        "mean_weight": routed.weight[inside].mean(axis=0),
        "summed_lpi": positive(lpi.mean(axis=0)),
    }
    for method in METHODS:
        values = importance[method]
        best = np.lexsort((-lpi.sum(axis=0), -values))[:LISTED]  # stable: then the earlier layer and expert
        for rank, expert in enumerate(best[values[best] > 0], start=1):
            yield method, (rank, *routed.experts.row(int(expert)), float(values[expert]))


def expert_overlap(
    importance: pl.DataFrame, published: pl.DataFrame | None, routed: Mapping[int, int], step: int | None
) -> pl.DataFrame:
    """How many experts the five leading ones by two methods have in common, as the table ``expert_overlap``.

    ``importance`` is the table ``expert_importance``, of which the lists of all prompts are compared; ``published``
    holds rows of ``read_published`` of this model (null or empty: none), whose list of a relation stands against every
    method (``other`` is then ``published``). ``routed`` is the number of experts by routing layer. A list counts each
    expert once, also where it repeats one. ``chance``: what random lists of these sizes have in common on average,
    size x other_size / N of all N experts; ``chance_given_layers``: the same where each layer keeps its number of
    members, sum a_l b_l / E_l; ``p``: the probability that lists drawn so, layer by layer, have so many in common, or
    more. Raises ImportanceError where a list names an expert that the model does not have.
    """
    sizes = np.array([routed[layer] for layer in sorted(routed)], dtype=np.int64)
    layers = np.repeat(np.arange(len(sizes)), sizes)
    number = {one: i for i, one in enumerate((layer, e) for layer in sorted(routed) for e in range(routed[layer]))}
    lists = _lists(importance.filter(pl.col("fold").is_null()), "method")
    if published is not None:
        theirs = _lists(published.with_columns(_list=pl.lit(PUBLISHED)), "_list")
        lists = {relation: own | theirs.get(relation, {}) for relation, own in lists.items()}
    rows = []
    for relation, own in lists.items():
        _refuse_strangers(relation, own, number, step)
        names = [*METHODS, PUBLISHED] if PUBLISHED in own else METHODS
        sets = {name: np.array(sorted(number[one] for one in own.get(name, ())), dtype=np.int64) for name in names}
        for method, other in combinations(sets, 2):
            a, b = sets[method], sets[other]
            common = len(np.intersect1d(a, b))
            chance = len(a) * len(b) / len(number)
            given_layers, _ = expected_overlap(a, b, layers, sizes)
            p = _p_given_layers(common, *(np.bincount(layers[one], minlength=len(sizes)) for one in (a, b)), sizes)
            rows.append((step, relation, method, other, len(a), len(b), common, chance, given_layers, p))
    return tables.of_rows(rows, "expert_overlap")


def _p_given_layers(common: int, a: np.ndarray, b: np.ndarray, sizes: np.ndarray) -> float:
    """The probability that random members, a_l and b_l of the E_l experts of each layer, have ``common`` ones or more:
    the sum of independent hypergeometric numbers."""
    total = np.ones(1)
    for one, other, size in zip(a, b, sizes, strict=True):
        total = np.convolve(total, hypergeom.pmf(np.arange(min(one, other) + 1), size, one, other))
    return float(min(1.0, total[common:].sum()))


def _lists(frame: pl.DataFrame, name: str) -> dict[str, dict[str, set[tuple[int, int]]]]:
    """The leading experts (layer, expert) by relation and by what the column ``name`` says."""
    lists: dict[str, dict[str, set[tuple[int, int]]]] = {}
    leading = frame.filter(pl.col("rank") <= COMPARED)
    for relation, one, layer, expert in leading.select("relation", name, *_EXPERT).iter_rows():
        lists.setdefault(relation, {}).setdefault(one, set()).add((layer, expert))
    return lists


def _refuse_strangers(
    relation: str, lists: Mapping[str, set[tuple[int, int]]], known: Container[tuple[int, int]], step: int | None
) -> None:
    """Every expert that a list names is one of the model."""
    for name, experts in lists.items():
        if strangers := sorted(one for one in experts if one not in known):
            layer, expert = strangers[0]
            found = f"step {step_name(step)}: the {name} list of {relation} names expert {expert} of layer {layer}"
            raise ImportanceError(f"{found}, which the model does not have; take the lists of this model")


def read_published(path: str | os.PathLike) -> pl.DataFrame:
    """The paper's lists of leading experts (``resources/published/top_experts.csv``): relation, model, rank, layer,
    expert.

    Layers and experts count from 0, ranks from 1. Raises ImportanceError where the columns are others, a cell is empty
    or a number is none.
    """
    try:
        lists = pl.read_csv(path, infer_schema=False)
        if tuple(lists.columns) != _LISTS:
            raise ImportanceError(f"{path}: the columns must be {', '.join(_LISTS)}; restore the file")
        lists = lists.with_columns(pl.col("rank", *_EXPERT).cast(tables.ID))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ImportanceError(f"{path}: {str(error).splitlines()[0]}; restore the file") from error
    if empty := [name for name in _LISTS if lists[name].null_count()]:
        raise ImportanceError(f"{path}: column {empty[0]} has an empty cell; restore the file")
    return lists


def _torn(what: str) -> ImportanceError:
    return ImportanceError(f"{what}; delete the results of this checkpoint and run again")
