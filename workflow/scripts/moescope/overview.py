"""The first look at a series: how well it knows the facts, which layers carry them, which experts stand out.

Tables of single checkpoints in, summary tables with 95% intervals out. Checkpoints come as an iterable and are read one
at a time, so that a series of hundreds needs the memory of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import polars as pl

from moescope import tables
from moescope.errors import MoescopeError
from moescope.sample import Checkpoint, Prompts
from moescope.statistics import Estimate, Resamples, hits, reciprocal_ranks

METRICS = ("hit@1", "hit@10", "mrr", "log_prob")
TOP_EXPERTS = 5


class OverviewError(MoescopeError):
    """Tables of a series that do not fit together."""


def accuracy(
    checkpoints: Iterable[Checkpoint], prompts: pl.DataFrame, exposure: pl.DataFrame | None = None, seed: int = 0
) -> pl.DataFrame:
    """HIT@1, HIT@10, MRR and mean log-probability (nats) of the target, as the table ``accuracy``.

    ``checkpoints`` carry ``predictions``; ranks are those among all tokens (``rank``). Subsets: ``all``; ``flagged``
    (leaked, merged at the boundary, or an object of several tokens) and ``unflagged``; with ``exposure`` also ``seen``
    and ``held_out`` (is the scored template in the training text?) and ``exposure_1`` to ``exposure_4``, the quarters
    of the *seen* prompts by how often their fact was met, 1 the rarest. A subset or scope without prompts has no row.
    Micro averages run over prompts, macro averages over relations. Raises OverviewError where tables do not fit.
    """
    known = Prompts(prompts, seed)
    rows = []
    for step, tokens, frame in checkpoints:
        placed = known.place(frame, step)
        rank = placed["rank"].to_numpy()
        values = np.column_stack([hits(rank, 1), hits(rank, 10), reciprocal_ranks(rank), placed["log_prob"].to_numpy()])
        subject, stratum = placed["_subject"].to_numpy(), placed["_stratum"].to_numpy()
        for subset, rows_of in _subsets(placed, exposure).items():
            if rows_of.any():
                sums = known.bootstrap.resample(values[rows_of], subject[rows_of], stratum[rows_of])
                rows += [(step, tokens, subset, *row) for row in _accuracies(known, sums, set(stratum[rows_of]))]
    return _table("accuracy", rows)


def _accuracies(known: Prompts, sums: Resamples, strata: set[int]) -> Iterator[tuple]:
    for scope, name, members in known.scopes(strata):
        averages = {"micro": sums.micro(members)}
        if scope != "relation":
            averages["macro"] = sums.macro(members)
        for average, estimate in averages.items():
            for metric, interval in zip(METRICS, _intervals(estimate), strict=True):
                yield scope, name, average, metric, *interval, sums.prompts(members)


def _subsets(predictions: pl.DataFrame, exposure: pl.DataFrame | None) -> dict[str, np.ndarray]:
    flagged = (
        predictions.select(pl.col("leaked") | pl.col("boundary_merge") | pl.col("single_token").not_())
        .to_series()
        .to_numpy()
    )
    subsets = {"all": np.ones(len(predictions), dtype=bool), "flagged": flagged, "unflagged": ~flagged}
    if exposure is None:
        return subsets
    met = predictions.select("prompt_id").join(exposure, on="prompt_id", how="left", maintain_order="left")
    if met["held_out"].null_count():
        stranger = met.filter(pl.col("held_out").is_null())["prompt_id"][0]
        raise OverviewError(
            f"prompt {stranger} is not in exposure.parquet; delete the series' checkpoints and train it again"
        )
    held_out, exposures = met["held_out"].to_numpy(), met["exposures"].to_numpy()
    subsets |= {"seen": ~held_out, "held_out": held_out}
    quarter = np.zeros(len(met), dtype=np.int64)
    quarter[~held_out] = _quarters(exposures[~held_out])
    return subsets | {f"exposure_{q}": quarter == q for q in (1, 2, 3, 4)}


def _quarters(counts: np.ndarray) -> np.ndarray:
    """The quarter (1 lowest, 4 highest) in which the mid-rank of each count lies; equal counts share a quarter."""
    ordered = np.sort(counts)
    middle = (np.searchsorted(ordered, counts, "left") + np.searchsorted(ordered, counts, "right")) / 2
    return 1 + (4 * middle / max(len(counts), 1)).astype(np.int64)


def layer_importance(checkpoints: Iterable[Checkpoint], prompts: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Log-probability increase (nats, mean over prompts) of attention and FFN, as the table ``layer_importance``.

    ``checkpoints`` carry ``layers``. Per layer, and their mean and sum over layers (``layer`` is null there).
    """
    known = Prompts(prompts, seed)
    rows = []
    for step, tokens, frame in checkpoints:
        placed, layers, increase = known.layers(frame, step)
        columns = np.concatenate(
            [increase, increase.mean(axis=1, keepdims=True), increase.sum(axis=1, keepdims=True)], axis=1
        )
        labels = [*(("layer", layer) for layer in layers), ("mean", None), ("total", None)]
        estimate = known.bootstrap.resample(columns.reshape(len(placed), -1), placed["_subject"].to_numpy()).micro()
        names = [(*label, component) for label in labels for component in tables.COMPONENTS]
        rows += [(step, tokens, *name, *ends) for name, ends in zip(names, _intervals(estimate), strict=True)]
    return _table("layer_importance", rows)


def top_experts(routing: pl.DataFrame, prompts: pl.DataFrame, step: int | None, seed: int = 0) -> pl.DataFrame:
    """The experts with the largest mean log-probability increase of every relation, as the table ``top_experts``.

    An expert's increase on a prompt is the sum over its neurons, 0 where it was not routed to. ``elsewhere`` is the
    same expert's mean over the prompts of all other relations (null with a single relation), ``routed`` the share of
    the relation's prompts that were routed to it; experts that none was routed to are not listed. Chosen and estimated
    on the same prompts: the values of the first ranks are optimistic. Ties go to the earlier layer and expert.
    """
    known = Prompts(prompts, seed)
    placed = known.place(routing.select("prompt_id", "layer", "expert", "slot", "lpi"), step)
    scored, experts, increase, used = _by_expert(placed)
    stratum, subject = scored["_stratum"].to_numpy(), scored["_subject"].to_numpy()
    rows = []
    for relation in np.unique(stratum):
        inside = stratum == relation
        share = used[inside].mean(axis=0)
        means = np.where(share > 0, increase[inside].mean(axis=0), -np.inf)
        best = np.argsort(-means, kind="stable")[: min(TOP_EXPERTS, int((share > 0).sum()))]
        estimate = known.bootstrap.resample(increase[np.ix_(inside, best)], subject[inside]).micro()
        elsewhere = [None] * len(best) if inside.all() else increase[np.ix_(~inside, best)].mean(axis=0).tolist()
        for rank, (expert, ends) in enumerate(zip(best, _intervals(estimate), strict=True), start=1):
            name = known.relations[relation]
            rows.append((step, name, rank, *experts[expert], *ends, float(share[expert]), elsewhere[rank - 1]))
    return _table("top_experts", rows)


def _by_expert(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[tuple[int, int]], np.ndarray, np.ndarray]:
    """One row per prompt, the (layer, expert) pairs, and per prompt and pair the increase and whether it was routed."""
    scored = frame.unique("prompt_id").sort("prompt_id")
    pairs = frame.select("layer", "expert").unique().sort("layer", "expert")
    place = frame.select(
        row=pl.col("prompt_id").replace_strict(scored["prompt_id"], pl.Series(range(len(scored)))),
        column=pl.struct("layer", "expert").rank("dense").cast(pl.Int64) - 1,
    )
    row, column = place["row"].to_numpy(), place["column"].to_numpy()
    increase = np.zeros((len(scored), len(pairs)))
    used = np.zeros(increase.shape, dtype=bool)
    increase[row, column] = frame["lpi"].to_numpy()
    used[row, column] = frame["slot"].is_not_null().to_numpy()
    return scored, pairs.rows(), increase, used


def _intervals(estimate: Estimate) -> Iterator[tuple[float, float | None, float | None]]:
    for value, low, high in zip(estimate.value, estimate.low, estimate.high, strict=True):
        yield float(value), None if np.isnan(low) else float(low), None if np.isnan(high) else float(high)


def _table(name: str, rows: list[tuple]) -> pl.DataFrame:
    if not rows:
        raise OverviewError(f"{name}: there is no checkpoint with prompts to summarise")
    return tables.of_rows(rows, name)
