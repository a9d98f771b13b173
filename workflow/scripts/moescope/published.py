"""The paper's tables 2, 3 and 4 of study dynamics: ours with interval and null, and the published number beside it.

A published number stands only beside a series that is the published model, and in the reading that is the default.
Shares are shares here: the paper's 6.3% is 0.063.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import polars as pl

from moescope import tables
from moescope.errors import MoescopeError
from moescope.layer_dynamics import within
from moescope.neuron_sets import READINGS, TOP
from moescope.statistics import jackknife, rounding_variance

#: Repositories whose checkpoints are those of the paper, and its name for the model. The dense one is ambiguous there.
MODELS = {
    "allenai/OLMoE-1B-7B-0924": "OLMoE-1B-7B",
    "allenai/OLMo-7B": "OLMo-7B",
    "allenai/OLMo-7B-hf": "OLMo-7B",
}
COLUMNS = ("study", "table", "model", "component", "relation", "condition", "quantity", "value", "unit")
#: What the paper calls our quantities.
QUANTITIES = {
    "jaccard": "mean_top1pct_jaccard",
    "gain_share": "mean_positive_gain_concentration",
    "consistency": "layer_distribution_consistency",
    "cv": "cross_step_cv",
    "top_1_head": "mean_hit10_relative_drop",
    "top_10_heads": "mean_hit10_relative_drop",
    "top_1pct_neurons": "mean_hit10_relative_drop",
}
MASKS = {
    "top_1_head": "mask top-1 head",
    "top_10_heads": "mask top-10 heads",
    "top_1pct_neurons": "mask top-1% FFN neurons",
}
#: The other reading of the paper's 100K-600K: its values are quoted at the later step of a pair, 100K too.
OTHER_READING = {"70000-600000": "100000-600000"}
#: Checkpoints in the paper's means, by window, and by model for the whole series.
CHECKPOINTS = {
    "10000-70000": 7,
    "100000-600000": 6,
    "70000-600000": 7,
    "10000-600000": 13,
    "10000-1200000": 19,
    "OLMo-7B": 13,
    "OLMoE-1B-7B": 19,
}
#: Interventions of table 4: component and quantity.
INTERVENTIONS = {
    ("head", "1"): ("attn", "top_1_head"),
    ("head", "10"): ("attn", "top_10_heads"),
    ("head", "1%"): ("attn", "top_1pct_heads"),
    ("ffn_neuron", "1%"): ("ffn", "top_1pct_neurons"),
}
#: What may stand for chance in J, the strictest that there is first.
_NULLS = {
    "jaccard_given_expert": {"ffn": "N1: given layer and expert", "attn": "N1: given layer and head"},
    "jaccard_given_layer": dict.fromkeys(tables.COMPONENTS, "N1: given layer"),
}
_UNIFORM = (float(TOP), None, None, "uniform gains")
_WITHOUT = [f"without_{g}" for g in range(10)]


class PublishedError(MoescopeError):
    """A table of published numbers that cannot be read."""


def read(path: str | os.PathLike) -> pl.DataFrame:
    """The published numbers (``resources/published/figures.csv``), all columns text but ``value``.

    Raises PublishedError where the columns are others or a value is no number.
    """
    try:
        figures = pl.read_csv(path, infer_schema=False)
        if tuple(figures.columns) != COLUMNS:
            raise PublishedError(f"{path}: the columns must be {', '.join(COLUMNS)}; restore the file")
        return figures.with_columns(pl.col("value").cast(pl.Float64))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise PublishedError(f"{path}: {str(error).splitlines()[0]}; restore the file") from error


def published(
    figures: pl.DataFrame, model: str | None, table: int, component: str, quantity: str, condition: str
) -> float | None:
    """The number of the paper for our names of quantity and condition; null where it gives none.

    ``model`` is the paper's name (``MODELS``), null for any other model. Windows are ``<from>-<to>`` in steps or
    ``all``. Per cents become shares.
    """
    if model is None or quantity not in QUANTITIES:
        return None
    found = figures.filter(
        study="dynamics",
        table=str(table),
        model=model,
        component=component,
        quantity=QUANTITIES[quantity],
        condition=MASKS.get(quantity) or _condition(condition),
    )
    if found.is_empty():
        return None
    value, unit = found.select("value", "unit").row(0)
    return value / 100 if (unit or "").startswith("percent") else value


def _condition(window: str) -> str:
    """``10000-1200000`` as the paper writes it: ``steps 10K-1.2M``."""
    if window == "all":
        return "all steps"
    ends = [int(end) for end in window.split("-")]
    return "steps " + "-".join(f"{end / 1e6:g}M" if end >= 1e6 else f"{end / 1e3:g}K" for end in ends)


def table_2(
    dynamics: Mapping[str, pl.DataFrame],
    windows: Iterable[Sequence[int]],
    repos: Mapping[str, str | None],
    figures: pl.DataFrame,
) -> pl.DataFrame:
    """Stability J and concentration R (in its four readings): means over the pairs of consecutive checkpoints.

    ``dynamics`` holds the table ``neuron_dynamics`` of every series, ``repos`` its repository (null: none). A window
    takes the pairs with both ends inside. Intervals: jackknife over groups of subjects of the mean itself. Null of J:
    what routing (layer and expert, or head) leaves to chance, else the layer, else random sets; its ends are 1.96
    standard deviations of the mean over pairs, which are independent under it, within 0 and 1. Null of R: uniform
    gains.
    """
    windows, rows = list(windows), []
    for series, frame in dynamics.items():
        model = MODELS.get(repos.get(series) or "")
        frame = frame.filter(pl.col("population") == "all", pl.col("average") == "micro").sort("step")
        for component in frame["component"].unique().sort():
            mine = frame.filter(pl.col("component") == component)
            for quantity in ("jaccard", *READINGS):
                pairs = mine.filter(pl.col("metric") == quantity)
                steps = sorted({*pairs["step_from"], *pairs["step"]})
                for window, chosen in within(steps, windows).items() if steps else ():
                    inside = (pl.col("step_from") >= steps[chosen[0]]) & (pl.col("step") <= steps[chosen[-1]])
                    ours, number = _mean(pairs.filter(inside))
                    null = _null_of_j(mine.filter(inside), component) if quantity == "jaccard" else _UNIFORM
                    beside = published(figures, model, 2, component, quantity, OTHER_READING.get(window, window))
                    notes = [_note_on_checkpoints(len(chosen), window, model)] if beside is not None else []
                    if missing := pairs.filter(inside)["value"].null_count():
                        notes.append(f"no value in {missing} of {len(chosen) - 1} pairs")
                    tail = (number, beside, _joined(notes))
                    rows.append((series, component, quantity, window, *ours, *null, *tail))
    return tables.of_rows(rows, "table_2")


def _mean(pairs: pl.DataFrame) -> tuple[tuple[float | None, float | None, float | None], int]:
    """Mean over the pairs that have a value, its jackknife interval, and the number of their checkpoints."""
    pairs = pairs.filter(pl.col("value").is_not_null())
    if pairs.is_empty():
        return (None, None, None), 0
    value = pairs["value"].mean()
    without = pairs.select(_WITHOUT).cast(pl.Float64).to_numpy().mean(axis=0)
    rounded = rounding_variance(pairs["resolution"].cast(pl.Float64).fill_null(0.0)).sum() / len(pairs) ** 2
    low, high = jackknife(value, without, rounded)
    return (value, tables.number(low), tables.number(high)), len({*pairs["step_from"], *pairs["step"]})


def _null_of_j(rows: pl.DataFrame, component: str) -> tuple[float, float | None, float | None, str]:
    """Expected J of the pairs in ``rows``, with its ends, and what is held fixed."""
    for metric, texts in _NULLS.items():
        pairs = rows.filter(pl.col("metric") == metric, pl.col("value").is_not_null())
        if len(pairs):
            value, high = (pairs[end].cast(pl.Float64).to_numpy() for end in ("value", "high"))
            mean, reach = value.mean(), np.linalg.norm(high - value) / len(value)  # low ends are cut off at 0
            low, high = np.clip([mean - reach, mean + reach], 0, 1)
            return float(mean), tables.number(low), tables.number(high), texts[component]
    share = float(TOP)
    return share / (2 - share), None, None, "random sets of 1%"


def _note_on_checkpoints(number: int, window: str, model: str) -> str | None:
    """How a mean over so many checkpoints is not the published one."""
    notes = ["the paper's 100K-600K, read with the pair from 70K to 100K"] if window in OTHER_READING else []
    theirs = CHECKPOINTS[model if window == "all" else window]
    return _joined([*notes, None if number == theirs else f"over {number} checkpoints, the paper's over {theirs}"])


def _joined(notes: Iterable[str | None]) -> str | None:
    return "; ".join(note for note in notes if note) or None


def table_3(layers: Mapping[str, pl.DataFrame], repos: Mapping[str, str | None], figures: pl.DataFrame) -> pl.DataFrame:
    """Consistency of the layer profile and cross-step CV, with their variants, by window; they have no null.

    ``layers`` holds the table ``layer_dynamics`` of every series, ``repos`` its repository (null: none).
    """
    rows = []
    for series, frame in layers.items():
        model = MODELS.get(repos.get(series) or "")
        chosen = frame.filter(pl.col("metric").str.contains("^(consistency|cv)"))
        for component, metric, window, value, low, high, number in chosen.iter_rows():
            beside = published(figures, model, 3, component, metric, window)
            notes = [_note_on_checkpoints(number, window, model)] if beside is not None else []
            if value is None:
                notes.append("no value: a profile is the same in all layers, or a mean is 0")
            ours = (series, component, metric, window, value, low, high)
            rows.append((*ours, None, None, None, None, number, beside, _joined(notes)))
    return tables.of_rows(rows, "table_3")


def table_4(
    summaries: Mapping[str, pl.DataFrame], repos: Mapping[str, str | None], figures: pl.DataFrame
) -> pl.DataFrame:
    """Mean relative drop of HIT@10 over checkpoints, beside that of random and of matched sets.

    ``summaries`` holds the table ``robustness_summary`` of every series, ``repos`` its repository (null: none).
    Conditions: average, how selection and test are kept apart, what chose the set (unless signed importance), and
    ``matched control`` where that is the null; else it is random sets. A control with a value at other checkpoints than
    the selection is no null. The published number stands beside what it is like, the in-sample selection by signed
    importance; the paper does not say which average it is.
    """
    rows = []
    for series, frame in summaries.items():
        model = MODELS.get(repos.get(series) or "")
        frame = frame.filter(scope="all", metric="hit@10", statistic="mean")
        for one in frame.filter(control="none").iter_rows(named=True):
            if (one["site"], one["size"]) not in INTERVENTIONS:
                continue
            component, quantity = INTERVENTIONS[one["site"], one["size"]]
            signed = one["ranking"] == "signed"
            condition = f"{one['average']}, {'cross-fitted' if one['crossfit'] else 'in-sample'}"
            condition += "" if signed else f", by {one['ranking']}"
            like = signed and not one["crossfit"]
            beside = published(figures, model, 4, component, quantity, condition) if like else None
            ours = (one["value"], one["low"], one["high"])
            for suffix, null, lacking in _controls(frame, one):
                here = beside if not suffix else None
                number = _note_on_checkpoints(one["checkpoints"], "all", model) if here is not None else None
                tail = (one["checkpoints"], here, _joined([_note_on_drop(one), number, lacking]))
                rows.append((series, component, quantity, condition + suffix, *ours, *null, *tail))
    return tables.of_rows(rows, "table_4")


def _controls(frame: pl.DataFrame, one: Mapping) -> Iterator[tuple[str, tuple, str | None]]:
    """(suffix of the condition, null and what it is, note) of a selection: random sets, then matched if there are."""
    same = frame.filter(site=one["site"], size=one["size"], average=one["average"])
    matched = same.filter(
        pl.col("control") == "matched",
        pl.col("ranking").eq_missing(pl.lit(one["ranking"])),
        pl.col("crossfit") == one["crossfit"],
    )
    yield "", *_null_of_drop(same.filter(control="random"), "random", one["checkpoints"])
    if len(matched):
        yield ", matched control", *_null_of_drop(matched, "matched", one["checkpoints"])


def _null_of_drop(control: pl.DataFrame, name: str, checkpoints: int) -> tuple[tuple, str | None]:
    """Drop of a control, its ends and what it is, and a note; a mean over other checkpoints compares with nothing."""
    nothing = (None,) * 4
    if control.is_empty():
        return nothing, None
    *ours, number = control.select("value", "low", "high", "checkpoints").row(0)
    if number != checkpoints:
        return nothing, f"{name} control at {number} of {checkpoints} checkpoints only"
    return (*ours, f"{name} sets"), None


def _note_on_drop(one: Mapping) -> str | None:
    asked = one["checkpoints"] + one["unavailable"]
    missing = f"no value at {one['unavailable']} of {asked} checkpoints: clean HIT@10 below 0.1"
    return _joined(
        [
            None if one["crossfit"] else "in-sample, as in the paper",
            "more than 10% of all heads, or as many as a smaller size" if one["degenerate"] else None,
            missing if one["unavailable"] else None,
        ]
    )
