"""What a model's layers add to the log-probability of the answer: in total, per layer, by stage, per parameter.

A gain is the log-probability increase of a layer's FFN or attention, summed over layers, mean over prompts. In
sequential models the gains of both add up to log p_L - log p_0 whatever the model is, so that a larger FFN gain is a
smaller attention gain, and a gain divided by the number of layers tells much of that number. A share of a total that is
not positive has no meaning and no value; and no interval where the total's own interval reaches down to zero, as the
share then has no bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import polars as pl

from moescope import tables
from moescope.errors import MoescopeError
from moescope.sample import Prompts
from moescope.statistics import ZERO, Resamples, hits, percentiles, reciprocal_ranks
from moescope.steps import step_name

#: Matrices of a gated feed-forward layer: gate, up, down.
MATRICES = 3
_ATTN, _FFN = map(tables.COMPONENTS.index, ("attn", "ffn"))


class EfficiencyError(MoescopeError):
    """Tables of a checkpoint that do not fit together, or edges of stages that are none."""


class Scored(NamedTuple):
    """A scored checkpoint: its step (null: ``main``), three of its tables, and d, the width of its residual stream
    (null: unknown)."""

    step: int | None
    predictions: pl.DataFrame
    layers: pl.DataFrame
    active_sums: pl.DataFrame
    d: int | None


def efficiency(series: str, scored: Scored, prompts: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """One checkpoint of a series as rows of the table ``efficiency``, ``published`` and ``note`` left null.

    Means run over all prompts, and everything is computed anew in every draw. Quantities:

    - ``hit@10`` and ``mrr`` of the ranks among all tokens;
    - ``ffn_gain`` and ``attn_gain`` (nats);
    - ``peak_layer``: mean over prompts of the layer, from 0, whose FFN increases most (ties: the earlier);
      ``peak_depth``: that number divided by the number of layers L; ``peak_layer_relations``: mean over relations of
      the layer with the largest mean FFN increase, in a draw over the relations that have prompts in it;
    - ``layer_efficiency``: FFN gain / L;
    - ``ffn_share``: FFN gain / (FFN + attention gain), null unless both are positive;
    - ``gain_share``: (FFN + attention gain) / (log p_L - log p_0), a ratio of means, 1 up to rounding in sequential
      models; ``ffn_gain_share``: the same of the FFN gain alone; null where log p_L - log p_0 is not positive;
    - ``gain_per_active_parameter``: FFN gain (nats) per million parameters of the FFN neurons that are active in a
      prompt (mean over prompts), each with d numbers in each of the three matrices of a gated layer; null where d is
      unknown. A layer without a gate has two, 2/3 of what is counted here; biases and routers are not counted.

    Raises EfficiencyError where the tables are of different prompts or lack layers.
    """
    known = Prompts(prompts, seed)
    placed, increase = _increases(known, scored.layers, scored.step)
    predictions = _beside(placed, scored.predictions, "predictions", scored.step)
    active = _beside(placed, scored.active_sums.filter(component="ffn"), "active_sums", scored.step)
    ffn, layers = increase[..., _FFN], increase.shape[1]
    columns = [
        *_ranked(predictions),
        ffn.argmax(axis=1),
        (predictions["log_prob"].cast(pl.Float64) - predictions["log_prob_h0"].cast(pl.Float64)).to_numpy(),
        active["active"].to_numpy(),
        increase[..., _ATTN].sum(axis=1),
    ]
    subject, stratum = placed["_subject"].to_numpy(), placed["_stratum"].to_numpy()
    sums = known.bootstrap.resample(np.column_stack([*columns, ffn]), subject, stratum)
    means = sums.draws().T
    hit, mrr, peak, rise, neurons, attn_gain = means[: len(columns)]
    ffn_gain = means[len(columns) :].sum(axis=0)
    gain, parameters = ffn_gain + attn_gain, neurons * MATRICES * (scored.d or np.nan)
    quantities = {
        "hit@10": hit,
        "mrr": mrr,
        "ffn_gain": ffn_gain,
        "attn_gain": attn_gain,
        "peak_layer": peak,
        "peak_depth": peak / layers,
        "peak_layer_relations": _peaks_of_relations(sums, len(columns)),
        "layer_efficiency": ffn_gain / layers,
        "ffn_share": _share(ffn_gain, gain, _positive(ffn_gain) & _positive(attn_gain)),
        "gain_share": _share(gain, rise, _positive(rise)),
        "ffn_gain_share": _share(ffn_gain, rise, _positive(rise)),
        "gain_per_active_parameter": 1e6 * _share(ffn_gain, parameters, _positive(parameters)),
    }
    ends = _intervals(quantities.values(), sums.subjects())
    rows = [(series, scored.step, name, *of_name, None, None) for name, of_name in zip(quantities, ends, strict=True)]
    return tables.of_rows(rows, "efficiency")


def _peaks_of_relations(sums: Resamples, first: int) -> np.ndarray:
    """Mean over relations of the layer that leads their mean FFN increase, [1 + draws]; column ``first`` is layer 0."""
    totals, there = sums.totals[..., first:], sums.sizes > 0
    means = np.divide(totals, sums.sizes[..., None], out=np.zeros(totals.shape), where=there[..., None])
    with np.errstate(invalid="ignore"):
        return (means.argmax(axis=2) * there).sum(axis=1) / there.sum(axis=1)


class Stage(NamedTuple):
    """Some consecutive layers: from ``first`` up to, and without, ``end``."""

    name: str
    first: int
    end: int

    @property
    def label(self) -> str:
        """Which layers they are, from 0, the last one included: ``layers 0-12``, ``layer 3``."""
        return f"layer {self.first}" if self.end - self.first == 1 else f"layers {self.first}-{self.end - 1}"


def stages(layers: int, edges: tuple[int, int] | None = None) -> list[Stage]:
    """The stages ``early`` [0, a), ``mid`` [a, b) and ``late`` [b, L) of L layers that have any.

    ``edges`` are (a, b), by default floor(13 L / 24) and floor(19 L / 24), which may leave a stage of very few layers
    empty. Raises EfficiencyError unless given edges have 0 < a < b < L.
    """
    a, b = edges or (13 * layers // 24, 19 * layers // 24)
    if edges and not 0 < a < b < layers:
        asked = f"stages of {layers} layers cannot have the edges {a} and {b}"
        raise EfficiencyError(f"{asked}; give two with 0 < first < second < {layers}, or none for the default")
    bounds = (("early", 0, a), ("mid", a, b), ("late", b, layers))
    return [Stage(name, first, end) for name, first, end in bounds if first < end]


def gains(
    step: int | None, layers: pl.DataFrame, prompts: pl.DataFrame, seed: int = 0, edges: tuple[int, int] | None = None
) -> pl.DataFrame:
    """Where along the layers a checkpoint gains, as the table ``gains``; ``layers`` is its table of that name.

    Per component and layer: ``layer``, the mean increase (nats), ``cumulative``, the sum up to and with the layer, and
    ``share``, that of the total over all layers. Per component and stage (``stages``, with ``edges``): ``stage_gain``,
    the sum over its layers, ``stage_share`` of the total, and ``stage_gain_per_layer``. Shares are null where the total
    is not positive; with negative layers a share may exceed 1. Raises EfficiencyError where all prompts lack a layer,
    or where edges do not fit.
    """
    known = Prompts(prompts, seed)
    placed, increase = _increases(known, layers, step)
    number = increase.shape[1]
    sums = known.bootstrap.resample(increase.reshape(len(placed), -1), placed["_subject"].to_numpy())
    means = sums.draws()
    means = means.reshape(len(means), number, -1)
    named = {}
    for i, component in enumerate(tables.COMPONENTS):
        for quantity, stage, layer, values in _curves(means[..., i], stages(number, edges)):
            named[component, quantity, stage, layer] = values
    ends = _intervals(named.values(), sums.subjects())
    return tables.of_rows([(step, *key, *of_key) for key, of_key in zip(named, ends, strict=True)], "gains")


def _curves(means: np.ndarray, parts: list[Stage]) -> Iterator[tuple[str, str | None, int | None, np.ndarray]]:
    """(quantity, stage, layer, values [1 + draws]) from mean increases [1 + draws, layers] of one component."""
    cumulative = means.cumsum(axis=1)
    total = cumulative[:, -1]
    positive = _positive(total)
    for layer in range(means.shape[1]):
        yield "layer", None, layer, means[:, layer]
        yield "cumulative", None, layer, cumulative[:, layer]
        yield "share", None, layer, _share(cumulative[:, layer], total, positive)
    for stage in parts:
        gain = means[:, stage.first : stage.end].sum(axis=1)
        yield "stage_gain", stage.name, None, gain
        yield "stage_share", stage.name, None, _share(gain, total, positive)
        yield "stage_gain_per_layer", stage.name, None, gain / (stage.end - stage.first)


def relation_accuracy(
    series: str, step: int | None, predictions: pl.DataFrame, prompts: pl.DataFrame, seed: int = 0
) -> pl.DataFrame:
    """HIT@10 and MRR of one checkpoint of a series by relation, as the table ``relation_accuracy``.

    Ranks are those among all tokens. Beside the relations stand ``all``, the mean over prompts, and ``macro``, the mean
    over relations. Raises EfficiencyError where there are no prompts.
    """
    if predictions.is_empty():
        found = f"step {step_name(step)}: predictions.parquet holds no prompts"
        raise EfficiencyError(f"{found}; delete the file and run again")
    known = Prompts(prompts, seed)
    placed = known.place(predictions, step).sort("prompt_id")
    subject, stratum = placed["_subject"].to_numpy(), placed["_stratum"].to_numpy()
    sums = known.bootstrap.resample(np.column_stack(_ranked(placed)), subject, stratum)
    present = np.unique(stratum).tolist()
    averaged = {"all": ("micro", present), "macro": ("macro", present)}
    rows = []
    for relation, (average, members) in {**averaged, **{known.relations[s]: ("micro", [s]) for s in present}}.items():
        ends = _intervals(sums.draws(average, members).T, sums.subjects(members))
        for metric, of_metric in zip(("hit@10", "mrr"), ends, strict=True):
            rows.append((series, step, relation, metric, *of_metric, sums.prompts(members)))
    return tables.of_rows(rows, "relation_accuracy")


def _ranked(predictions: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Of every prompt whether it is a hit at 10, and its reciprocal rank."""
    rank = predictions["rank"].to_numpy()
    return hits(rank, 10), reciprocal_ranks(rank)


def _increases(known: Prompts, frame: pl.DataFrame, step: int | None) -> tuple[pl.DataFrame, np.ndarray]:
    """A placed row per prompt, and the increases [prompts, layers, components], of all layers from 0 on."""
    placed, layers, increase = known.layers(frame, step)
    if not layers or layers[-1] != len(layers) - 1:
        found = f"step {step_name(step)}: layers.parquet lacks a layer"
        raise EfficiencyError(f"{found}; delete the file and run again")
    return placed, increase


def _beside(placed: pl.DataFrame, frame: pl.DataFrame, name: str, step: int | None) -> pl.DataFrame:
    """The rows of another table, in the order of the prompts, of which each must have one."""
    frame = frame.sort("prompt_id")
    if not frame["prompt_id"].equals(placed["prompt_id"]):
        found = f"step {step_name(step)}: {name}.parquet and layers.parquet are of different prompts"
        raise EfficiencyError(f"{found}; delete this step's results and run again")
    return frame


def _positive(total: np.ndarray) -> np.ndarray:
    """Where a total [1 + draws] is positive: in no draw where its 95% interval reaches zero."""
    positive = total > ZERO
    positive[1:] &= percentiles(total[1:, None])[0] > ZERO
    return positive


def _share(part: np.ndarray, whole: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=where)


def _intervals(quantities: Iterable[np.ndarray], subjects: int) -> Iterator[tuple[float | None, ...]]:
    """(value, low, high) of each quantity [1 + draws], null where not available; no interval of one subject."""
    draws = np.column_stack(list(quantities))
    if subjects < 2:
        draws[1:] = np.nan
    for ends in zip(draws[0], *percentiles(draws[1:]), strict=True):
        yield tuple(map(tables.number, ends))
