"""What the report says of study collaboration: the sentences to read first, tables and figures, from its frames."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from moescope.report import UNKNOWN, Drawing, Study, Table, interval, number

#: Figures in the order of the page: those over all series first.
FIGURES = {
    "efficiency": "What the layers gain",
    "gain_curves": "Where along the layers it is gained",
    "relation_accuracy": "Knowledge of the facts by relation",
    "budget": "Fewer routing slots",
    "blocking": "What breaks without the leading experts",
    "expert_overlap": "Do lists of leading experts agree?",
    "association": "Heads and experts that go together",
    "causality": "Do heads steer the routers?",
    "neuron_types": "Shared and routed among the leading neurons",
    "neuron_overlap": "Leading neurons that prompts and relations have in common",
}
OVER_ALL = ("efficiency", "gain_curves", "relation_accuracy")
#: Figures about experts, and what there is not to be done in a dense model.
OF_EXPERTS = {
    "budget": "leave out",
    "blocking": "block",
    "expert_overlap": "list",
    "association": "route",
    "causality": "route",
    "neuron_types": "tell apart",
    "neuron_overlap": "tell apart",
}
OF_SHARED_EXPERTS = ("neuron_types", "neuron_overlap")
EFFICIENCY = {
    "hit@10": "HIT@10",
    "mrr": "MRR",
    "ffn_gain": "FFN gain (nats)",
    "attn_gain": "attention gain (nats)",
    "ffn_share": "FFN share of both",
    "gain_share": "both / (log p at the output − at the embedding)",
    "ffn_gain_share": "FFN gain / (log p at the output − at the embedding)",
    "peak_layer": "peak layer, mean over prompts",
    "peak_depth": "peak layer / number of layers",
    "peak_layer_relations": "peak layer, mean over relations",
    "layer_efficiency": "FFN gain / number of layers (nats)",
    "gain_per_active_parameter": "FFN gain / million active FFN parameters (nats)",
}
MODES = {"top_n": "the n heaviest", "only_rank": "the n-th alone", "drop_rank": "all but the n-th"}
#: Quantities of ``causality``.
EFFECTS = {
    "gate_drop": "share of what later routers give to the experts in use that is lost without the head",
    "expert_gate_drop": "the same of the expert alone (below 0: it gains); of all pairs in the direction of r",
    "mrr_drop": "share of the MRR lost without the head",
    "forced_mrr": "MRR without the head and with the expert forced, of the clean one",
    "recovery": "share of the loss that comes back so (of all pairs: of their mean loss)",
    "gradient_share": "the head's share of the positive attribution of all heads of its layer (r < 0: of the negative)",
    "gradient_share_with_rest": "the same with what is left without heads",
    "gradient_gap": "completeness gap of the integrated gradients, of the probability (routers on the way switch)",
}
#: Pairs that are taken together, by the sign of r.
POOLS = {None: "all pairs", "+": "pairs with r > 0", "-": "pairs with r < 0"}
#: Ways to choose the leading experts of a relation.
METHODS = {
    "top_neuron_frequency": "number of prompts in which they own one of the 100 leading FFN neurons",
    "top_neuron_count": "number of the 100 leading FFN neurons of every prompt that they own",
    "routing_frequency": "share of the prompts that are routed to them",
    "mean_weight": "mean weight that the router gives them",
    "summed_lpi": "mean log-probability increase of all their neurons",
}
LISTED = 5
#: Pairs of a series in the table of associations.
PAIRS = 10
ALPHA = 0.05
CAVEATS = (
    "Every interval covers the choice of subjects, not seeds, architectures or the choice of relations: there is one "
    "training run of each model. Models differ in more than their architecture.",
    "Attention and FFN gain are complementary by accounting: in sequential models they add up to log p at the output "
    "minus log p at the embedding. Gain per layer is largely accounting too: fewer layers, more gain in each.",
    "Experts that are chosen and blocked on the same prompts look more important than they are (in-sample, as in the "
    "paper). The cross-fitted numbers choose them on the subjects of one fold and block them on the other.",
    "What is lost without the leading experts counts beyond what is lost without others of the same layers that are "
    "chosen as often over all positions of the prompts (matched control). At the last position, where experts are "
    "selected and the answer is read, the leading ones may be chosen far more often; how much more is said below.",
    "That a head and an expert go together is no cause. The pairs were searched for among very many, so their r is "
    "too large; that on the other fold of subjects is not.",
    "Heads are suppressed and experts forced at all positions, while integrated gradients are taken at the last one: "
    "the three say different things about a pair.",
    "Series trained here (source pretrain) are tiny models: their efficiency says nothing about architectures.",
)
_CELL = ("value", "low", "high")


@dataclass(frozen=True)
class Series:
    """What the report says of one series: whether it is dense, and has shared experts, its step (null: ``main``).

    ``tables`` by name, those of one checkpoint too (``expert_importance``, ``associations``), ``figures`` as PNG bytes;
    ``notes`` say in sentences what could not be had, and how well controls match.
    """

    name: str
    dense: bool
    shared: bool
    step: int | None
    tables: Mapping[str, pl.DataFrame]
    figures: Mapping[str, bytes]
    notes: Sequence[str] = ()

    def table(self, name: str) -> pl.DataFrame | None:
        """A table at the step of the series; null where there is none, or no rows."""
        found = self.tables.get(name)
        if found is not None and "step" in found.columns:
            found = _at(found, self.step)
        return None if found is None or found.is_empty() else found


def study(
    series: Sequence[Series],
    tables: Mapping[str, pl.DataFrame],
    figures: Mapping[str, bytes],
    method: str = "top_neuron_frequency",
) -> Study:
    """Study collaboration on the page. ``tables`` and ``figures`` are those over all series, by name; ``method``: by
    what the experts that are blocked were chosen."""
    shown = [_figure(name, heading, series, figures) for name, heading in FIGURES.items()]
    notes = [*CAVEATS, *(f"{one.name}: {line}" for one in series for line in one.notes)]
    return Study("collaboration", "Study: collaboration", notes, list(_tables(series, tables, method)), shown)


def _figure(name: str, heading: str, series: Sequence[Series], figures: Mapping[str, bytes]) -> Drawing:
    if name in OVER_ALL:
        found = name in figures
        return Drawing(name, heading, {"all series": figures[name]} if found else {}, [] if found else ["Not drawn."])
    images = {one.name: one.figures[name] for one in series if name in one.figures}
    missing = [f"{one.name}: {_lacks(name, one)}." for one in series if name not in one.figures]
    return Drawing(name, heading, images, missing)


def _lacks(figure: str, series: Series) -> str:
    if series.dense and figure in OF_EXPERTS:
        return f"no experts, so there is nothing to {OF_EXPERTS[figure]}"
    if figure in OF_SHARED_EXPERTS and not series.shared:
        return "has no shared expert"
    return "not measured here"


def _tables(series: Sequence[Series], tables: Mapping[str, pl.DataFrame], method: str) -> Iterable[Table]:
    if "efficiency" in tables:
        yield from _efficiency(series, tables["efficiency"])
    of_series = {
        "budgets": _budgets,
        "blocking": _blocking,
        "expert_importance": functools.partial(_experts, method=method),
        "associations": _associations,
        "causality": _causality,
        "shared_neurons": _shared_neurons,
    }
    for name, described in of_series.items():
        having = [one for one in series if one.table(name) is not None]
        if having:
            yield described(having)
    if "beside_published" in tables and len(tables["beside_published"]):
        yield _beside_published(tables["beside_published"])


def _efficiency(series: Sequence[Series], table: pl.DataFrame) -> Iterable[Table]:
    """Quantities by series, and beside them what the paper prints."""
    found = {one.name: _at(table.filter(pl.col("series") == one.name), one.step) for one in series}
    rows = [
        [label, *(_cell(frame.filter(quantity=quantity)) for frame in found.values())]
        for quantity, label in EFFICIENCY.items()
        if any(quantity in frame["quantity"] for frame in found.values())
    ]
    if rows:
        note = "Value and 95% interval (bootstrap over subjects), all prompts, micro. Layers count from 0."
        yield Table("Efficiency", ["quantity", *found], rows, note)
    beside = [
        [name, EFFICIENCY[row["quantity"]], interval(*_ends(row)), number(row["published"]), row["note"] or ""]
        for name, frame in found.items()
        for row in frame.filter(pl.col("published").is_not_null()).iter_rows(named=True)
    ]
    if beside:
        columns = ["series", "quantity", "value", "published", "note"]
        note = "A published value stands beside ours only where the series is the published model."
        yield Table("Efficiency beside the paper's table 1", columns, beside, note, words=2)


def _budgets(series: Sequence[Series]) -> Table:
    rows = []
    for one in series:
        table = one.table("budgets").filter(scope="all", average="micro", weights="family")
        key = ["mode", "size", "shared"]
        for mode, size, shared in table.select(key).unique().sort(key, descending=[True, False, True]).iter_rows():
            here = table.filter(mode=mode, size=size, shared=shared)
            cells = [
                _cell(here.filter(metric=metric), prefix) for metric in ("hit@10", "mrr") for prefix in ("", "drop_")
            ]
            with_it = ("yes" if shared else "no") if one.shared else UNKNOWN
            rows.append([one.name, MODES[mode], with_it, str(size), *cells])
    columns = ["series", "slots left", "shared expert", "n", "HIT@10", "lost of it", "MRR", "lost of it"]
    note = (
        "Routing slots of every token in every layer, heaviest first, n from 1 (0: none); weights by the family's own "
        "rule. All prompts, micro. Lost: relative to the clean run."
    )
    return Table("Routing budgets (the paper's tables 2, 3)", columns, rows, note, words=3)


def _blocking(series: Sequence[Series]) -> Table:
    rows = []
    for one in series:
        table = one.table("blocking").filter(scope="all", metric="mrr")
        key = ["semantics", "size", "average"]
        order = [pl.col("semantics") != "reroute", *key[:2], pl.col("average") != "macro"]
        for semantics, size, average in table.select(key).unique().sort(order).iter_rows():
            here = table.filter(semantics=semantics, size=size, average=average)
            fitted = here.filter("crossfit")
            cells = [_cell(fitted.filter(control=control)) for control in ("none", "matched")]
            random = here.filter(control="random").sort("crossfit", descending=True).head(1)
            excess = _cell(fitted.filter(control="matched"), "excess_")
            in_sample = _cell(here.filter(~pl.col("crossfit"), control="none"))
            named = (one.name, semantics, average, str(size), number(here["clean"][0]))
            rows.append([*named, *cells, _cell(random), excess, in_sample, str(here["prompts"].max())])
    columns = ["series", "blocked by", "average", "experts", "clean MRR", "lost, cross-fitted", "matched control"]
    columns += ["random control", "beyond matched", "lost, in-sample", "prompts"]
    note = (
        "Relative loss of MRR without the leading experts of each relation, in all layers and positions, with 95% "
        "intervals. Matched: experts of the same layers, chosen as often over all positions. In-sample is what the "
        "paper did. Excess: beyond the control, its interval that of one more draw of the control."
    )
    return Table("Blocking the leading experts (tables 5, 8)", columns, rows, note, words=3)


def _experts(series: Sequence[Series], method: str) -> Table:
    rows = []
    for one in series:
        overlap = one.table("expert_overlap")
        table = one.table("expert_importance").filter(pl.col("fold").is_null(), method=method).sort("relation", "rank")
        for (relation,), leading in table.partition_by("relation", as_dict=True, maintain_order=True).items():
            listed = leading.filter(pl.col("rank") <= LISTED).iter_rows(named=True)
            rows.append([one.name, relation, ", ".join(map(_expert, listed)), *_overlap(overlap, relation, method)])
    columns = ["series", "relation", "experts (layer, number)", "in the paper's list", "by chance", "by layers", "p"]
    note = f"Routed experts, chosen on all prompts by the {METHODS[method]}."
    if all(row[3] == UNKNOWN for row in rows):  # none of these is a model of the paper
        columns, rows = columns[:3], [row[:3] for row in rows]
    else:
        note += (
            " Chance: what as many experts drawn from all layers, or from the same layers, would have in common with "
            "the paper's list; p of as many or more, by layers."
        )
    return Table("Leading experts by relation (tables 5, 8)", columns, rows, note, words=3)


def _overlap(overlap: pl.DataFrame | None, relation: str, method: str) -> list[str]:
    """Experts in common with the paper's list, what chance gives, and p; dashes where it prints none."""
    found = None if overlap is None else overlap.filter(relation=relation, method=method, other="published")
    if found is None or found.is_empty():
        return [UNKNOWN] * 4
    row = found.row(0, named=True)
    common = f"{row['common']} of {row['other_size']}"
    return [common, *(number(row[name]) for name in ("chance", "chance_given_layers", "p"))]


def _associations(series: Sequence[Series]) -> Table:
    rows = []
    for one in series:
        table = one.table("associations").filter(pl.col("relation").is_null())
        tested = table.filter(pl.col("fold").is_not_null())
        shown = tested if len(tested) else table
        order = [-pl.col("r").abs(), "head_layer", "head", "layer", "expert", "fold"]
        for row in shown.sort(order).head(PAIRS).iter_rows(named=True):
            numbers = (number(row[name]) for name in ("r", "p", "null_95", "r_tested", "p_tested"))
            counts = (f"{row[name]:,}" for name in ("pairs", "prompts"))
            rows.append([one.name, _head(row), _expert(row), *numbers, _replicated(row), *counts])
    columns = ["series", "head", "expert", "r", "p", "95% of largest", "r, other fold", "p there", "replicated"]
    note = (
        f"The {PAIRS} largest |r| of each series, over prompts and centred within relation, of a head's "
        "log-probability increase and an expert's probability; found on one fold of subjects and tested on the other. "
        "p and the 95% quantile are those of the largest |r| among all pairs searched, p there is that of the pair "
        f"alone. Replicated: of the same sign there, with p ≤ {ALPHA:g}."
    )
    return Table(
        "Strongest associations of heads and experts (table 4)", [*columns, "pairs", "prompts"], rows, note, words=3
    )


def _replicated(row: Mapping) -> str:
    if row["r_tested"] is None or row["p_tested"] is None:
        return UNKNOWN
    return "yes" if row["r"] * row["r_tested"] > 0 and row["p_tested"] <= ALPHA else "no"


def _causality(series: Sequence[Series]) -> Table:
    rows = []
    for one in series:
        table = one.table("causality").filter(pl.col("gate_layer").is_null())
        if table["sign"].drop_nulls().n_unique() < 2:  # the pairs of one sign are all pairs
            table = table.filter(pl.col("head").is_not_null() | pl.col("sign").is_null())
        key = ["head_layer", "head", "layer", "expert", "fold", "sign", "quantity"]
        for row in table.sort(key, nulls_last=False).iter_rows(named=True):
            names = (POOLS[row["sign"]], "") if row["head"] is None else (_head(row), _expert(row) + _marked(row))
            cells = (interval(*_ends(row, prefix)) for prefix in ("", "control_", "excess_"))
            rows.append([one.name, *names, row["quantity"], *cells, str(row["prompts"])])
    columns = ["series", "head", "expert", "quantity", "value", "control", "beyond it", "prompts"]
    note = " ".join(f"{quantity}: {meaning}." for quantity, meaning in EFFECTS.items())
    note = (
        f"All with 95% intervals. (-): r is negative where the pair was found; the head should turn its expert down. "
        f"{note} Controls: other heads of the layer, other experts of it, 1 / number of heads. Beyond it: the pair "
        "held against its control as if it were another draw of it."
    )
    return Table("Do heads steer the routers? (section 4.3)", columns, rows, note, words=4)


def _shared_neurons(series: Sequence[Series]) -> Table:
    rows = []
    for one in series:
        table = one.table("shared_neurons").sort("within", "relation", "rank")
        for (within, relation), part in table.partition_by(
            "within", "relation", as_dict=True, maintain_order=True
        ).items():
            leading = part.head(LISTED).select("layer", "neuron").iter_rows()
            names = ", ".join(f"N({layer},{neuron})" for layer, neuron in leading)
            rows.append([one.name, within, relation, names])
    note = "Neurons of the shared expert of largest mean log-probability increase over the relation's prompts."
    columns = ["series", "among", "relation", "neurons (layer, number)"]
    return Table("Leading neurons of the shared expert (table 7)", columns, rows, note, words=4)


def _beside_published(table: pl.DataFrame) -> Table:
    rows = [
        [
            *(row["series"], row["table"], row["quantity"], row["relation"] or "", row["condition"]),
            *(interval(*_ends(row)), number(row["published"]), interval(*_ends(row, "null_"))),
            *(row["null"] or UNKNOWN, row["note"] or ""),
        ]
        for row in table.iter_rows(named=True)
    ]
    columns = ["series", "in its", "quantity", "relation", "condition", "value", "published", "null", "what null"]
    note = (
        "Value with 95% interval where there is one. Shares stand as fractions. Only series that are the published "
        "models, at main, in the paper's reading; – where ours was not measured so."
    )
    return Table("Ours beside the paper's numbers", [*columns, "note"], rows, note, words=5)


def _at(table: pl.DataFrame, step: int | None) -> pl.DataFrame:
    return table.filter(pl.col("step").eq_missing(pl.lit(step, dtype=pl.Int64)))


def _head(row: Mapping) -> str:
    return f"H({row['head_layer']},{row['head']})"


def _expert(row: Mapping) -> str:
    return f"E({row['layer']},{row['expert']})"


def _marked(row: Mapping) -> str:
    return " (-)" if row["sign"] == "-" else ""


def _ends(row: Mapping, prefix: str = "") -> tuple[float | None, float | None, float | None]:
    return tuple(row[f"{prefix}{end}"] for end in _CELL)


def _cell(found: pl.DataFrame, prefix: str = "") -> str:
    """The one value in these rows with its interval; a dash for no rows."""
    return UNKNOWN if found.is_empty() else interval(*_ends(found.row(0, named=True), prefix))
