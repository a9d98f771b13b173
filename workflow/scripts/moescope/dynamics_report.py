"""What the report says of study dynamics: the sentences to read first, the tables and the figures, from its frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from moescope.report import UNKNOWN, Drawing, Study, Table, interval

#: Figures in the order of the page: those over all series first.
FIGURES = {
    "sparsity": "Is it more than sparsity?",
    "comparison": "The series beside each other",
    "stability": "Stability of the most important neurons",
    "concentration": "Concentration of gains",
    "survival": "Survival of the most important neurons",
    "consolidation": "Consolidation of the layers",
    "robustness": "What breaks without heads and neurons",
    "dose_response": "Dose and response",
    "faithfulness": "Is the score faithful?",
}
#: What a figure needs that a series may lack.
NEEDS_COURSE = ("stability", "concentration", "survival", "consolidation")
NEEDS_SAMPLE = ("faithfulness",)
OVER_ALL = {
    "sparsity": "needs a mixture of experts and a dense series beside each other (dynamics.pairs), and group tables",
    "comparison": "needs two series of two checkpoints or more",
}
SCORES = {
    "lpi": "log-probability increase",
    "gradient": "gradient × activation",
    "magnitude": "|coefficient| × |value|",
    "random": "random",
}
CAVEATS = (
    "Every interval covers the choice of subjects, not seeds or architectures: there is one training run of each.",
    "Series differ in more than their architecture: in size, in what they were trained on, and in how long. A "
    "difference between them is not yet an effect of routing.",
    "Neurons that a prompt is not routed to score 0, so a mixture of experts looks concentrated and stable for a "
    "mechanical reason. 'Beyond sparsity' is said only where it exceeds a dense model seen through real routing (N2), "
    "the dense model prompt by prompt among active neurons (N3), and the dense model at an equal share of active "
    "neurons (N4), intervals included.",
    "Attention and FFN importance are complementary by accounting, in every layer profile and its course.",
)


@dataclass(frozen=True)
class Series:
    """What the report says of one series: its steps in the study, those ablated, its tables and figures (PNG bytes)."""

    name: str
    steps: Sequence[int]
    ablated: Sequence[int]
    tables: Mapping[str, pl.DataFrame]
    figures: Mapping[str, bytes]


def study(series: Sequence[Series], tables: Mapping[str, pl.DataFrame], figures: Mapping[str, bytes]) -> Study:
    """Study dynamics on the page. ``tables`` and ``figures`` are those over all series, by name."""
    shown = [_figure(name, heading, series, figures) for name, heading in FIGURES.items()]
    notes = [*_verdicts(tables.get("verdict")), *CAVEATS, *(line for one in series for line in _flags(one))]
    return Study("dynamics", "Study: dynamics", notes, list(_tables(series, tables)), shown)


def _figure(name: str, heading: str, series: Sequence[Series], figures: Mapping[str, bytes]) -> Drawing:
    if name in OVER_ALL:
        missing = [] if name in figures else [f"Not drawn: {OVER_ALL[name]}."]
        return Drawing(name, heading, {"all series": figures[name]} if name in figures else {}, missing)
    images = {one.name: one.figures[name] for one in series if name in one.figures}
    return Drawing(
        name, heading, images, [f"{one.name}: {_lacks(name, one)}." for one in series if one.name not in images]
    )


def _lacks(figure: str, series: Series) -> str:
    if figure in NEEDS_COURSE:
        return "one checkpoint only, and this needs two"
    if not series.ablated:
        return "no checkpoint of it is ablated (ablation.series)"
    return "no neurons were sampled (ablation.neurons)"


def _verdicts(verdict: pl.DataFrame | None) -> Iterable[str]:
    if verdict is None:
        return
    said = {True: "beyond sparsity", False: "not beyond sparsity", None: "undecided"}
    for row in verdict.iter_rows(named=True):
        yield f"{row['moe']} against {row['dense']}, {row['claim']}: {said[row['beyond_sparsity']]}. {row['because']}"


def _flags(series: Series) -> Iterable[str]:
    """What a reader must know of the checkpoints of a series before its numbers."""
    if len(series.steps) == 1:
        yield f"{series.name} has one checkpoint: stability, gains and consolidation need two and are not given."
    twins = series.tables["overlap"].filter("identical", pl.col("step_from") < pl.col("step"))
    for row in twins.iter_rows(named=True):
        yield (
            f"{series.name}: steps {row['step_from']:,} and {row['step']:,} have exactly the same scores "
            f"({row['component']}): the same weights twice? Their overlap of 1 says nothing."
        )
    if (table := series.tables.get("robustness")) is not None:
        hits = table.filter(pl.col("metric") == "hit@10", pl.col("scope") == "all", pl.col("average") == "micro")
        absent = hits.filter(pl.col("value").is_null())["step"].unique().sort().to_list()
        if absent:
            steps = ", ".join(f"{step:,}" for step in absent)
            yield f"{series.name}: HIT@10 is below 0.1 at step {steps}: a relative drop is not available there."
        if names := table.filter("degenerate")["size"].unique().sort().to_list():
            yield f"{series.name}: removing {', '.join(names)} heads is degenerate in so small a model; not plotted."


def _tables(series: Sequence[Series], tables: Mapping[str, pl.DataFrame]) -> Iterable[Table]:
    headings = {
        "table_2": ("Stability and concentration (the paper's table 2)", "jackknife over subject groups"),
        "table_3": ("Layer profiles over training (table 3)", "bootstrap over subjects"),
        "table_4": ("Mean relative drop of HIT@10 (table 4)", "bootstrap over subjects"),
    }
    for name, (heading, source) in headings.items():
        if name in tables:
            shown = tables[name].filter(pl.col("condition").str.starts_with("macro").not_())  # those stand in the CSV
            if len(shown):
                yield _paper_table(shown, heading, source)
    if "sparsity" in tables:
        yield _sparsity_table(tables["sparsity"])
    ranked = [one for one in series if "score_faithfulness" in one.tables]
    if ranked:
        yield _faithfulness_table(ranked)


def _paper_table(table: pl.DataFrame, heading: str, source: str) -> Table:
    columns = ["series", "component", "quantity", "over", "value", "null", "what null", "checkpoints", "published"]
    rows = [
        [
            *(row["series"], row["component"], row["quantity"], row["condition"]),
            interval(row["value"], row["low"], row["high"]),
            interval(row["null_value"], row["null_low"], row["null_high"]),
            row["null"] or UNKNOWN,
            str(row["checkpoints"]),
            UNKNOWN if row["published"] is None else f"{row['published']:.3f}",
            row["note"] or "",
        ]
        for row in table.iter_rows(named=True)
    ]
    note = (
        f"Value and 95% interval ({source}). Shares stand as fractions. A published value stands beside ours only "
        "where the series is the published model."
    )
    return Table(heading, [*columns, "note"], rows, note, words=4)


def _sparsity_table(table: pl.DataFrame) -> Table:
    said = {True: "yes", False: "no", None: UNKNOWN}
    rows = [
        [
            *(row["claim"], row["test"], row["moe"], row["dense"]),
            *(interval(*(row[f"{one}_{end}"] for end in ("value", "low", "high"))) for one in _SIDES),
            said[row["exceeds"]],
            str(row["pairs"]),
        ]
        for row in table.iter_rows(named=True)
    ]
    columns = ["claim", "test", "mixture of experts", "dense", "MoE", "dense", "difference", "MoE exceeds", "pairs"]
    note = (
        "Means over consecutive checkpoints with 95% intervals over subjects. Plain: as they are. N1: overlap in "
        "excess of what routing alone gives. N2: the dense model seen through the routing of the other. N3: prompt by "
        "prompt, active neurons only; its intervals count prompts that had to be left out against either side. N4: the "
        "mixture of experts at 1% times its share of active neurons, the dense model at 1%, the last neuron in part."
    )
    return Table("The sparsity question in numbers", columns, rows, note, words=4)


_SIDES = ("moe", "dense", "difference")


def _faithfulness_table(series: Sequence[Series]) -> Table:
    rows = []
    for one in series:
        table = one.tables["score_faithfulness"]
        last = table.filter(pl.col("step") == table["step"].max())
        for (kind,), part in last.partition_by("kind", as_dict=True, maintain_order=True).items():
            found = {row["score"]: row for row in part.iter_rows(named=True)}
            cells = [interval(*(found[score][end] for end in ("value", "low", "high"))) for score in SCORES]
            rows.append([one.name, kind, f"{part['step'][0]:,}", str(part["neurons"][0]), *cells])
    note = (
        "Spearman correlation, over sampled neurons, of each score with what really happens to log p(target) when the "
        "neuron alone is zeroed at the last position; 95% bootstrap intervals over subjects."
    )
    columns = ["series", "neurons of kind", "step", "neurons", *SCORES.values()]
    return Table("Faithfulness of the score at the last ablated checkpoint", columns, rows, note, words=2)
