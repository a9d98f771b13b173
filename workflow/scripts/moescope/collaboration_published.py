"""The numbers of the paper of study collaboration, beside ours wherever a series is one of its models.

A published number stands only beside the same quantity, in the paper's reading: selection and test on the same prompts,
the family's own weights, micro averages. The paper's models are finished ones, so it stands beside ``main`` and no
other checkpoint. Shares are shares here: the paper's 6.1% is 0.061.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from moescope import association, tables
from moescope.pairs import Pair
from moescope.published import PublishedError

#: Repositories whose ``main`` is a model of the paper, and its name for the model.
MODELS = {
    "Qwen/Qwen1.5-MoE-A2.7B": "Qwen1.5-MoE-A2.7B",
    "allenai/OLMoE-1B-7B-0924": "OLMoE-1B-7B",
    "mistralai/Mixtral-8x7B-v0.1": "Mixtral-8x7B",
    "Qwen/Qwen1.5-7B": "Qwen1.5-7B",
    "huggyllama/llama-7b": "Llama-7B",
    "mistralai/Mistral-7B-v0.1": "Mistral-7B",
}
#: What must be known of a model before its numbers are compared.
REMARKS = {
    "OLMoE-1B-7B": "main is annealed; the paper names no revision",
    "Llama-7B": "main is a converted copy of the weights",
}
#: Our quantities of table 1, and what the paper calls them.
TABLE_1 = {
    "hit@10": "hit10",
    "mrr": "mrr",
    "ffn_gain": "total_ffn_gain",
    "attn_gain": "total_attn_gain",
    "peak_layer": "peak_gain_layer",
    "peak_depth": "peak_gain_position",
    "layer_efficiency": "layer_efficiency",
}
#: What the paper's prose says instead of its table 1.
PROSE = {
    ("Qwen1.5-MoE-A2.7B", "ffn_gain"): 7.05,
    ("Qwen1.5-MoE-A2.7B", "attn_gain"): 3.58,
    ("Qwen1.5-MoE-A2.7B", "peak_depth"): 0.878,
    ("Qwen1.5-MoE-A2.7B", "layer_efficiency"): 0.294,
    ("OLMoE-1B-7B", "ffn_gain"): 4.79,
    ("OLMoE-1B-7B", "attn_gain"): 4.78,
    ("OLMoE-1B-7B", "peak_depth"): 0.787,
    ("OLMoE-1B-7B", "layer_efficiency"): 0.299,
    ("Qwen1.5-7B", "attn_gain"): 3.91,
    ("Qwen1.5-7B", "layer_efficiency"): 0.213,
    ("Llama-7B", "attn_gain"): 4.06,
    ("Llama-7B", "peak_depth"): 0.792,
}
_CLAIM = "of Qwen1.5-MoE over Qwen1.5-7B its prose says 37%, its table 51%"
#: Routing budgets of tables 2 and 3 and of figure 4: mode, size, and shared experts (null: the model has none).
BUDGETS = {
    "top-1 routed only": ("top_n", 1, False),
    "top-2 routed only": ("top_n", 2, False),
    "shared only": ("top_n", 0, True),
    "shared + 2nd routed": ("only_rank", 2, True),
    "shared + top-1": ("top_n", 1, True),
    "shared + top-2": ("top_n", 2, True),
    "shared + top-4 (default)": ("top_n", 4, True),
    "top-0": ("top_n", 0, None),
    "top-1": ("top_n", 1, None),
    "top-2 (default)": ("top_n", 2, None),
    "1 expert": ("top_n", 1, None),
    "3 experts": ("top_n", 3, None),
    "4 experts": ("top_n", 4, None),
}
#: Table 8: how many of a relation's leading experts are blocked.
BLOCKED = {"block top-1 experts": 1, "block top-5 experts": 5, "block top-10 experts": 10}
#: The paper's stages count layers from 1; these are ours, without the end, and what section 3.3 says instead.
STAGES = {
    "layers 1-13": ("early", 0, 13, None),
    "layers 14-19": ("mid", 13, 19, 0.417),
    "layers 20-24": ("late", 19, 24, 0.507),
}
NEURONS = {"top 100": 100, "top 300": 300}
#: The head whose suppression the paper reports, and the expert that it forces.
PAIR = Pair(19, 12, 20, 59)
EXPERT_PAIR = "as printed: E(18,10) with E(20,59), p<0.001"
HEAD_PAIR = "H(23,15) with E(23,20), p<0.01"
_HEADS = "other heads of the layer"
#: What the paper calls our quantities of that pair: ours, what its control is, and what to know of the paper's.
CAUSALITY = {
    "top4_gate_probability_drop": ("gate_drop", _HEADS, "the paper does not say in which layers"),
    "mrr_drop": ("mrr_drop", _HEADS, None),
    "mrr_recovered": ("forced_mrr", "other experts of the layer, forced", "read as MRR forced / clean"),
    "integrated_gradients_share_from_heads": (
        "gradient_share_with_rest",
        "the mean head of the layer",
        "the paper's is a mean over pairs, of what whole it does not say; ours is the share of the pair's head in the "
        "attribution of all heads of its layer and what is left without them; the pair that the paper names is "
        "H(22,13)-E(21,48), whose head comes after its expert",
    ),
}
_NOTHING = (None, None, None)
_NO_NULL = (*_NOTHING, None)


@dataclass(frozen=True)
class Ours:
    """Tables of one series, null where there is none.

    ``correlations`` holds (r, low, high) of ``EXPERT_PAIR`` and ``HEAD_PAIR``, null where it was not computed; an
    ``association.Correlation`` will do.
    """

    gains: pl.DataFrame | None = None
    budgets: pl.DataFrame | None = None
    blocking: pl.DataFrame | None = None
    causality: pl.DataFrame | None = None
    neuron_types: pl.DataFrame | None = None
    correlations: Mapping[str, Sequence[float | None] | None] | None = None


@dataclass(frozen=True)
class _Found:
    """Ours beside a published number: name of the quantity, value and ends, null with ends and what it is, a note, and
    why there is no value where there is none."""

    quantity: str
    value: tuple[float | None, float | None, float | None]
    null: tuple[float | None, float | None, float | None, str | None] = _NO_NULL
    note: str | None = None
    absent: str = "not measured here"


def correlations(
    heads: pl.DataFrame,
    routing: pl.DataFrame,
    prompts: pl.DataFrame,
    by: str = "probability",
    permutations: int = association.PERMUTATIONS,
    seed: int = 0,
) -> dict[str, association.Correlation]:
    """Ours of the two correlations that the paper prints, by its labels; from tables ``heads`` and ``routing`` of
    Qwen1.5-MoE-A2.7B. The first is between two experts, whatever it is called there."""
    told = by, permutations, seed
    (of_head,) = association.correlation_of(heads, routing, prompts, [(23, 15, 23, 20)], *told)
    between = association.expert_correlation(routing, prompts, (18, 10), (20, 59), *told)
    return {EXPERT_PAIR: between, HEAD_PAIR: of_head}


def efficiency(table: pl.DataFrame, repos: Mapping[str, str | None], figures: pl.DataFrame) -> pl.DataFrame:
    """The table ``efficiency`` with ``published`` and ``note`` filled in from the paper's table 1.

    ``repos`` holds the repository of every series (null: none), ``figures`` the published numbers. Both columns stay
    null for other models, for checkpoints that are not ``main``, and for quantities that the paper does not give.
    """
    figures = figures.filter(study="collaboration")
    rows = []
    for row in table.iter_rows(named=True):
        model = MODELS.get(repos.get(row["series"]) or "") if row["step"] is None else None
        value = _table_1(figures, model, row["quantity"])
        note = None if value is None else _joined(_notes_on_table_1(figures, model, row["quantity"]))
        rows.append(tuple((row | {"published": value, "note": note}).values()))
    return tables.of_rows(rows, "efficiency")


def _table_1(figures: pl.DataFrame, model: str | None, quantity: str) -> float | None:
    if model is None or quantity not in TABLE_1:
        return None
    found = figures.filter(table="1", model=model, quantity=TABLE_1[quantity])
    return None if found.is_empty() else _share(*found.select("value", "unit").row(0))


def _notes_on_table_1(figures: pl.DataFrame, model: str, quantity: str) -> Iterator[str | None]:
    if (model, quantity) in PROSE:
        yield f"the paper's prose says {PROSE[model, quantity]:g}"
    if quantity == "layer_efficiency" and model.startswith("Qwen"):
        yield _CLAIM
    if quantity in ("hit@10", "mrr"):
        yield "the paper does not say over what it averages"
    if quantity == "mrr":
        of_relations = figures.filter(table="8", model=model, condition="none", quantity="mrr")["value"]
        yield f"its table 8 averages to {of_relations.mean():.2f} over relations" if len(of_relations) else None
    if quantity in ("peak_layer", "peak_depth"):
        yield "the paper does not say whether it counts layers from 0 or 1; ours from 0"
    if quantity == "peak_depth" and model == "Qwen1.5-7B":
        yield "not the paper's 27.08 of 32 layers, which is 0.846"
    yield REMARKS.get(model)


def beside_published(
    series: Mapping[str, Ours], accuracy: pl.DataFrame, repos: Mapping[str, str | None], figures: pl.DataFrame
) -> pl.DataFrame:
    """All other numbers of the paper, ours and a null beside each, as the table ``beside_published``.

    ``accuracy`` is the table ``relation_accuracy`` of all series, ``repos`` holds the repository of every series (null:
    none), ``figures`` the published numbers. A series that is a model of the paper has one row per number of that
    model; ``value`` is null, and the note says why, where ours was not measured in the paper's reading. Conditions are
    the paper's words. Raises PublishedError for a published quantity that is not known.
    """
    figures = figures.filter(pl.col("study") == "collaboration", pl.col("table") != "1")
    rows = []
    for name, ours in series.items():
        of_main = accuracy.filter(pl.col("series") == name, pl.col("step").is_null())
        for row in figures.filter(model=MODELS.get(repos.get(name) or "", "")).iter_rows(named=True):
            if row["quantity"] not in _READERS:
                raise PublishedError(f"figures.csv: quantity {row['quantity']} is not known; restore the file")
            found = _READERS[row["quantity"]](ours, of_main, row)
            note = _joined([found.note, found.absent if found.value[0] is None else None])
            key = (name, row["table"], found.quantity, row["condition"], row["relation"])
            rows.append((*key, *found.value, *found.null, _share(row["value"], row["unit"]), note))
    return tables.of_rows(rows, "beside_published")


def _metric(ours: Ours, accuracy: pl.DataFrame, row: Mapping) -> _Found:
    """HIT@10 or MRR: under a routing budget, of a relation, or of a relation without its leading experts."""
    metric = {"hit10": "hit@10", "mrr": "mrr"}[row["quantity"]]
    if row["relation"] is None:
        return _Found(metric, _under_budget(ours.budgets, row["condition"], metric))
    if row["condition"] in BLOCKED:
        return _without_experts(ours.blocking, BLOCKED[row["condition"]], row["relation"], metric)
    return _Found(metric, _ends(accuracy.filter(relation=row["relation"], metric=metric)))


def _under_budget(budgets: pl.DataFrame | None, condition: str, metric: str) -> tuple:
    mode, size, shared = BUDGETS[condition]
    found = _main(budgets, mode=mode, size=size, weights="family", scope="all", average="micro", metric=metric)
    return _ends(found if found is None or shared is None else found.filter(shared=shared))


def _without_experts(blocking: pl.DataFrame | None, size: int, relation: str, metric: str) -> _Found:
    scope = {"semantics": "reroute", "size": size, "scope": "relation", "name": relation, "metric": metric}
    found = _main(blocking, average="micro", **scope)
    if found is None or found.filter(control="none", crossfit=False).is_empty():
        return _Found(metric, _NOTHING)
    (value,) = found.filter(control="none", crossfit=False)["blocked"]
    control = found.filter(control="matched", crossfit=True)["blocked"]
    null = (control[0], None, None, "matched control (cross-fitted)") if len(control) else _NO_NULL
    return _Found(metric, (value, None, None), null, "in-sample, as in the paper")


def _stage(ours: Ours, _: pl.DataFrame, row: Mapping) -> _Found:
    """Share of the FFN gain of a stage, where the stages configured here are those of the paper."""
    stage, first, end, elsewhere = STAGES[row["condition"]]
    said = None if elsewhere is None else f"section 3.3 of the paper says {elsewhere:g}"
    ffn, name = _main(ours.gains, component="ffn"), "ffn_stage_share"
    if ffn is None:
        return _Found(name, _NOTHING)
    inside = ffn.filter(pl.col("quantity") == "layer", pl.col("layer").is_between(first, end, closed="left"))
    gain = ffn.filter(quantity="stage_gain", stage=stage)["value"]
    if len(inside) != end - first or len(gain) != 1 or not math.isclose(gain[0], inside["value"].sum(), rel_tol=1e-6):
        return _Found(name, _NOTHING, absent="the stages configured here are of other layers")
    return _Found(name, _ends(ffn.filter(quantity="stage_share", stage=stage)), note=said)


def _neurons(ours: Ours, _: pl.DataFrame, row: Mapping) -> _Found:
    """Share of routed experts among the leading neurons, against that among all active ones."""
    scope = {"ranking": "per_prompt", "scope": "all", "kind": "routed"}
    found = _main(ours.neuron_types, top=NEURONS[row["condition"]], **scope)
    if found is None or found.is_empty():
        return _Found("routed_share", _NOTHING)
    null = (found["chance_active"][0], None, None, "share among active neurons")
    return _Found("routed_share", _ends(found), null)


def _correlation(ours: Ours, _: pl.DataFrame, row: Mapping) -> _Found:
    value = (ours.correlations or {}).get(row["condition"]) or _NOTHING
    printed = "between two experts, as printed" if row["condition"] == EXPERT_PAIR else None
    return _Found("r", tuple(value[:3]), note=printed)


def _effect(ours: Ours, _: pl.DataFrame, row: Mapping) -> _Found:
    """What the head of the paper's pair does to its expert, where that pair was tested."""
    quantity, control, note = CAUSALITY[row["quantity"]]
    of_pair = _main(ours.causality, **PAIR._asdict())
    if of_pair is None:
        return _Found(quantity, _NOTHING)
    found = of_pair.filter(pl.col("gate_layer").is_null(), quantity=quantity).sort("fold", nulls_last=False).head(1)
    if found.is_empty():
        return _Found(quantity, _NOTHING, absent=f"{PAIR.label} was not tested: name it in collaboration.pairs")
    null = found.select("control_value", "control_low", "control_high").row(0)
    of_fold = None if found["fold"][0] is None else f"prompts of fold {found['fold'][0]} only"
    negative = quantity.startswith("gradient_share") and found["sign"][0] == "-"
    of_sign = "r is negative here: of the heads' negative attribution" if negative else None
    null = _NO_NULL if null[0] is None else (*null, control)
    return _Found(quantity, _ends(found), null, _joined([note, of_fold, of_sign]))


_READERS = {
    "hit10": _metric,
    "mrr": _metric,
    "stage_share_of_ffn_gain": _stage,
    "head_expert_pearson_r": _correlation,
    "routed_share_of_top_neurons": _neurons,
    **dict.fromkeys(CAUSALITY, _effect),
}


def _main(table: pl.DataFrame | None, **where: object) -> pl.DataFrame | None:
    """Rows of the checkpoint ``main`` of a table, null where there are none at all."""
    if table is None:
        return None
    of_main = table.filter(pl.col("step").is_null())
    return None if of_main.is_empty() else of_main.filter(**where)


def _ends(found: pl.DataFrame | None) -> tuple:
    return _NOTHING if found is None or found.is_empty() else found.select("value", "low", "high").row(0)


def _share(value: float, unit: str | None) -> float:
    return value / 100 if (unit or "").startswith("percent") else value


def _joined(notes: Iterable[str | None]) -> str | None:
    return "; ".join(note for note in notes if note) or None
