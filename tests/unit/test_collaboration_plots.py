"""The figures of study collaboration: they show their tables with chance and controls, and nothing collides."""

import functools
import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from docutils.core import publish_parts
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from moescope import collaboration_plots, coupling_plots, drawing, leading_plots
from tests.reading import (
    assert_clear_of_data,
    assert_legible,
    assert_no_panel_is_empty,
    laid_out,
    lines,
    panel,
    panels,
    parts,
    said,
)
from tests.unit.collaboration_tables import (
    METHODS,
    RELATIONS,
    SEMANTICS,
    SERIES,
    associations_table,
    blocking_table,
    budgets_table,
    causality_table,
    efficiency_table,
    expert_overlap_table,
    gains_table,
    neuron_overlap_table,
    neuron_types_table,
    relation_accuracy_table,
)
from tests.unit.dynamics_tables import LONG, assert_caption_warns

MODULES = {
    **dict.fromkeys(("efficiency", "gain_curves", "relation_accuracy", "budget", "blocking"), collaboration_plots),
    **dict.fromkeys(("expert_overlap", "neuron_types", "neuron_overlap"), leading_plots),
    **dict.fromkeys(("association", "causality"), coupling_plots),
}
ONE = ("r",)
#: Layers of the series: the paper's models have as many.
DEPTHS = dict(zip(SERIES, (24, 16, 32, 32, 32, 32), strict=True))


def many_gains():
    return {name: gains_table(DEPTHS[name], seed=seed) for seed, name in enumerate(SERIES)}


#: Name, variant -> tables in and title.
FIGURES = {
    "efficiency": lambda: (efficiency_table(), "all series"),
    "efficiency, one subject": lambda: (efficiency_table((LONG,), groups=False, published=0), "all series"),
    "gain_curves": lambda: (many_gains(), "all series"),
    "gain_curves, one subject": lambda: ({LONG: gains_table(2, groups=False)}, "all series"),
    "relation_accuracy": lambda: (relation_accuracy_table(), "all series"),
    "relation_accuracy, one relation": lambda: (relation_accuracy_table((LONG,), ONE, groups=False), "all series"),
    "budget": lambda: (budgets_table(4, shared=True), "qwen"),
    "budget, no shared": lambda: (budgets_table(8, renormalises=False), "olmoe"),
    "budget, one slot": lambda: (budgets_table(1, groups=False), LONG),
    "blocking": lambda: (blocking_table(), "qwen"),
    "blocking, three": lambda: (blocking_table(RELATIONS[:3], ("reroute",)), "tiny"),
    "blocking, one subject": lambda: (
        blocking_table(ONE, ("reroute",), (1,), groups=False, crossfit=False, controls=False),
        LONG,
    ),
    "expert_overlap": lambda: (expert_overlap_table(), "qwen"),
    "expert_overlap, none published": lambda: (expert_overlap_table(ONE, published=False), LONG),
    "association": lambda: (associations_table(), "qwen"),
    "association, twenty": lambda: (associations_table(pairs=20), "qwen"),
    "association, one relation": lambda: (associations_table(ONE, 2, folds=False), LONG),
    "causality": lambda: (causality_table(), "qwen"),
    "causality, one sign": lambda: (causality_table(2, both=False), "tiny"),
    "causality, one subject": lambda: (causality_table(1, groups=False, controls=False, named=True), LONG),
    "neuron_types": lambda: (neuron_types_table(), "qwen"),
    "neuron_types, three kinds": lambda: (neuron_types_table(ONE, ("dense", "routed", "shared"), groups=False), LONG),
    "neuron_overlap": lambda: (neuron_overlap_table(), "qwen"),
    "neuron_overlap, one relation": lambda: (neuron_overlap_table(ONE, groups=False, strangers=False), LONG),
}


def function_of(name):
    figure = name.split(",")[0]
    return getattr(MODULES[figure], figure)


@pytest.fixture(scope="module")
def drawn():
    @functools.cache
    def get(name):
        return laid_out(function_of(name)(*FIGURES[name]()))

    return get


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_can_be_read(drawn, name):
    figure = drawn(name)
    assert_legible(figure)
    assert_clear_of_data(figure)
    assert_no_panel_is_empty(figure)
    (heading,) = [part._suptitle.get_text() for part in parts(figure) if part._suptitle]
    assert FIGURES[name]()[1] in heading.replace("\n", "")
    assert figure.get_figwidth() == drawing.WIDTH
    assert figure.get_figheight() < 11


def spots(axes, label, upright=False):
    """(place, value) of all points whose legend entry is the label, in a list by place."""
    found = [line for line in axes.lines if line.get_label() == label]
    pairs = [pair for line in found for pair in zip(line.get_xdata(), line.get_ydata(), strict=True)]
    return sorted((x, y) if upright else (y, x) for x, y in pairs)


def intervals(axes, colour, upright=False):
    """(low, high) of all intervals in this colour, by rising place."""
    along, across = (1, 0) if upright else (0, 1)
    ends = []
    for collection in axes.collections:
        if isinstance(collection, LineCollection) and to_hex(collection.get_colors()[0]) == colour.lower():
            ends += [s for s in collection.get_segments() if s[0, across] == s[1, across]]
    return [(s[0, along], s[1, along]) for s in sorted(ends, key=lambda s: s[0, across])]


def ticks(axes, label):
    """Where ticks of chance stand, by rising place."""
    found = [c for c in axes.collections if c.get_label() == label]
    return [s[0, 0] for s in sorted((s for c in found for s in c.get_segments()), key=lambda s: s[0, 1])]


def values(pairs):
    return [value for _, value in pairs]


def heights(axes):
    """Place of every label."""
    return {
        " ".join(tick.get_text().split()): place
        for tick, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
    }


def written(axes):
    """(column, row) -> what stands in a cell."""
    return {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}


# --- series beside each other -----------------------------------------------------------------------------------------


def test_efficiency_draws_ours_beside_the_published(drawn):
    table = efficiency_table()
    for name, (title, _) in collaboration_plots.EFFICIENCY.items():
        axes, rows = panel(drawn("efficiency"), title), table.filter(quantity=name).sort("series")
        assert spots(axes, "here, 95% interval") == list(enumerate(rows["value"]))
        assert intervals(axes, drawing.VERMILLION) == rows.select("low", "high").rows()
        published = [(i + 0.25, p) for i, p in enumerate(rows["published"]) if p is not None]
        assert spots(axes, "published") == published
    grid = panels(drawn("efficiency"))
    assert heights(grid[0]) == {name: i for i, name in enumerate(sorted(SERIES))}
    assert "published" not in said(drawn("efficiency, one subject"))
    assert not panels(drawn("efficiency, one subject"))[0].collections


def test_a_quantity_without_values_has_no_panel():
    table = efficiency_table().with_columns(
        value=pl.when(pl.col("quantity") == "ffn_share").then(None).otherwise("value")
    )
    titles = [axes.get_title(loc="left") for axes in panels(collaboration_plots.efficiency(table, "all"))]
    assert "FFN share of the gain" not in titles
    assert len(titles) == 7


def test_gain_curves_share_an_axis_of_depth(drawn):
    figure = drawn("gain_curves")
    for title, quantity in (("Gain of a layer", "layer"), ("Gain up to a layer", "share")):
        for name, table in many_gains().items():
            rows = table.filter(component="ffn", quantity=quantity).sort("layer")
            x, y, _ = lines(panel(figure, title), name)
            assert x == pytest.approx(np.arange(1, DEPTHS[name] + 1) / DEPTHS[name])
            assert y.tolist() == rows["value"].to_list()


def test_stages_stand_beside_their_share_of_the_layers(drawn):
    axes = panel(drawn("gain_curves"), "Gain of a stage")
    even = sorted(
        itertools.chain(
            *(
                [s[:, 1] for s in c.get_segments()]
                for c in axes.collections
                if len(c.get_segments()) == 1 and to_hex(c.get_colors()[0]) == drawing.GREY.lower()
            )
        ),
        key=lambda s: s[0],
    )
    assert len(even) == 18
    layers = {name: (13 * n // 24, 19 * n // 24 - 13 * n // 24, n - 19 * n // 24) for name, n in DEPTHS.items()}
    expected = sorted(count / DEPTHS[name] for name, counts in layers.items() for count in counts)
    assert [s[0] for s in even] == pytest.approx(expected)
    for name, table in many_gains().items():
        shares = dict(table.filter(component="ffn", quantity="stage_share").select("stage", "value").iter_rows())
        found = {collaboration_plots.STAGES[round(x)]: y for x, y in spots(axes, name, upright=True)}
        assert found == pytest.approx(shares)


def test_relations_stand_in_the_order_of_what_is_known(drawn):
    table = relation_accuracy_table()
    figure = drawn("relation_accuracy")
    places = heights(panels(figure)[0])
    known = table.filter(metric="hit@10").group_by("relation").agg(pl.col("value").mean())
    known = {name: value for name, value in known.iter_rows() if name not in ("all", "macro")}
    expected = [f"{name.replace('_', ' ')} (n = 24)" for name in sorted(known, key=known.get, reverse=True)]
    assert list(places) == ["all prompts", "mean over relations", *expected]
    for axes, metric in zip(panels(figure), ("hit@10", "mrr"), strict=True):
        for name in SERIES:
            rows = table.filter(series=name, metric=metric)
            value = dict(rows.select("relation", "value").iter_rows())
            found = {list(places)[round(y)]: x for y, x in spots(axes, name)}
            assert found.pop("all prompts") == value["all"]
            assert found.pop("mean over relations") == value["macro"]
            assert found == {f"{r.replace('_', ' ')} (n = 24)": value[r] for r in known}


def test_a_series_has_one_colour_in_both_figures(drawn):
    one, other = panels(drawn("gain_curves"))[0], panels(drawn("relation_accuracy"))[0]
    colours = [lines(one, name)[2] for name in SERIES]
    assert colours == [lines(other, name)[2] for name in SERIES]
    assert len(set(colours)) == len(SERIES)


# --- fewer experts ----------------------------------------------------------------------------------------------------


def budget_rows(table, **wanted):
    return table.filter(scope="all", **wanted).sort("size")


@pytest.mark.parametrize(("mode", "column"), [("top_n", 0), ("only_rank", 1), ("drop_rank", 2)])
def test_budgets_by_number_of_slots(drawn, mode, column):
    table, names = budgets_table(4, shared=True), {True: "with the shared expert", False: "without it"}
    for (line, metric), shared in itertools.product(enumerate(("hit@10", "mrr")), (True, False)):
        axes = panels(drawn("budget"))[3 * line + column]
        for weights, end in (("family", ""), ("keep", ", weights of the clean run")):
            rows = budget_rows(table, mode=mode, metric=metric, shared=shared, weights=weights)
            found = spots(axes, names[shared] + end, upright=True)
            assert [round(place) for place, _ in found] == rows["size"].to_list()
            assert values(found) == rows["value"].to_list()
        clean = [x for line in axes.lines if line.get_label() == "clean" for x in line.get_ydata()]
        assert clean == pytest.approx([{"hit@10": 0.83, "mrr": 0.62}[metric]] * 2)


def test_clean_weights_are_drawn_only_where_they_differ(drawn):
    assert "weights of the clean run" not in said(drawn("budget, no shared"))
    assert "shared" not in said(drawn("budget, no shared"))
    table = budgets_table(4)
    nudge = pl.when(mode="drop_rank", weights="keep", size=2).then(pl.col("value") / 2).otherwise("value")
    family = pl.col("value").filter(weights="family").first().over("mode", "size", "scope", "metric")
    figure = collaboration_plots.budget(table.with_columns(value=family).with_columns(value=nudge), "m")
    where = [bool(spots(axes, "routed experts, weights of the clean run", True)) for axes in panels(figure)]
    assert where == [False, False, True] * 2


def test_blocking_by_relation_is_cross_fitted_and_marked(drawn):
    axes = panels(drawn("blocking"))[0]
    table = blocking_table().filter(scope="relation", crossfit=True)
    (image,) = axes.images
    names = sorted(set(RELATIONS) - {"occupation_age"})
    drops = np.array(
        [
            [
                table.filter(name=name, semantics=how, size=size, control="none")["value"][0]
                for how in SEMANTICS
                for size in (1, 5, 10)
            ]
            for name in names
        ]
    )
    assert np.array(image.get_array()) == pytest.approx(drops)
    assert image.norm.vmax == -image.norm.vmin == pytest.approx(np.abs(drops).max())
    assert written(axes)[3, 1] == f"{drops[1, 3]:.2f}".replace("-", "\N{MINUS SIGN}")
    marked = {
        (round(line.get_ydata()[0]), round(line.get_xdata()[0])) for line in axes.lines if len(line.get_xdata()) == 1
    }
    beyond = table.filter(pl.col("excess_low") > 0, control="matched")
    columns = list(itertools.product(SEMANTICS, (1, 5, 10)))
    expected = {
        (names.index(r["name"]), columns.index((r["semantics"], r["size"]))) for r in beyond.iter_rows(named=True)
    }
    assert marked == expected
    assert 0 < len(expected) < drops.size
    for word in (*SEMANTICS, "cross-fitted", "matched control"):
        assert word in said(drawn("blocking"))


def test_an_excess_below_0_is_marked_too_and_a_missing_drop_is_a_dash():
    table = blocking_table(("a", "b"), ("reroute",), (1,))
    of_a, of_b = pl.col("name") == "a", pl.col("name") == "b"
    table = table.with_columns(
        *(
            pl.when(of_a & pl.col(f"excess_{end}").is_not_null()).then(x).alias(f"excess_{end}")
            for end, x in (("value", -0.2), ("low", -0.3), ("high", -0.1))
        ),
        *(pl.when(of_b).then(None).otherwise(end).alias(end) for end in ("value", "low", "high")),
    )
    axes = panels(laid_out(collaboration_plots.blocking(table, "tiny")))[0]
    assert [round(line.get_ydata()[0]) for line in axes.lines] == [0]
    assert written(axes)[0, 1] == "\N{EN DASH}"


def test_in_sample_blocking_says_so(drawn):
    words = said(drawn("blocking, one subject"))
    assert "in-sample (optimistic)" in words
    assert "cross-fitted" not in words
    assert "control" not in words
    assert not any(axes.collections for axes in panels(drawn("blocking, one subject")))


def test_selection_and_controls_side_by_side(drawn):
    table = blocking_table().filter(scope="all")
    conditions = {
        "in-sample (optimistic)": {"control": "none", "crossfit": False},
        "cross-fitted": {"control": "none", "crossfit": True},
        "matched control": {"control": "matched"},
        "random control": {"control": "random"},
    }
    for axes, how in zip(panels(drawn("blocking"))[1:], SEMANTICS, strict=True):
        assert axes.get_title(loc="left") == how
        for label, wanted in conditions.items():
            rows = table.filter(semantics=how, **wanted).sort("size")
            found = spots(axes, label, upright=True)
            assert [round(place) for place, _ in found] == [0, 1, 2]
            assert values(found) == rows["value"].to_list()
            (line,) = [line for line in axes.lines if line.get_label() == label]
            assert intervals(axes, to_hex(line.get_color()), True) == rows.select("low", "high").rows()
            assert (line.get_markerfacecolor() == "white") == label.startswith("in-sample")


# --- what leads -------------------------------------------------------------------------------------------------------


def test_overlap_of_methods_is_a_mean_over_relations(drawn):
    methods, published = panels(drawn("expert_overlap"))
    table = expert_overlap_table()
    cells = np.array(methods.images[0].get_array().filled(np.nan))
    for (i, one), (j, other) in itertools.combinations(enumerate(METHODS), 2):
        common = table.filter(method=one, other=other)["common"].mean()
        assert cells[j - 1, i] == pytest.approx(common)
        assert written(methods)[i, j - 1] == f"{common:.1f}\n(0.4)"
    assert np.isnan(cells[np.triu_indices(4, 1)]).all()
    assert [label[0] for label in heights(methods)] == ["2", "3", "4", "5"]
    for (i, relation), (j, method) in itertools.product(enumerate(sorted(RELATIONS)), enumerate(METHODS)):
        (common,) = table.filter(relation=relation, method=method, other="published")["common"]
        assert published.images[0].get_array()[i, j] == common
        assert written(published)[j, i] == f"{common}\n(0.4)"
    assert "chance gives 0.017 at most" in said(drawn("expert_overlap"))
    assert len(panels(drawn("expert_overlap, none published"))) == 1


def test_pairs_stand_where_they_are_whichever_is_named_first():
    table = expert_overlap_table(ONE, published=False)
    turned = table.rename({"method": "other", "other": "method"}).select(table.columns)
    one, other = (panels(leading_plots.expert_overlap(t, "m"))[0].images[0].get_array() for t in (table, turned))
    assert one.tolist() == other.tolist()


def test_kinds_stand_beside_both_chances(drawn):
    table = neuron_types_table()
    overall, by_relation = panels(drawn("neuron_types"))
    for kind in ("routed", "shared"):
        for ranking, how in (("per_prompt", "ranked by prompt"), ("aggregate", "ranked by the mean")):
            rows = table.filter(kind=kind, ranking=ranking)
            found = spots(overall, f"{kind}, {how}", upright=True)
            assert [round(place) for place, _ in found] == [0, 1, 2]
            assert values(found) == rows.filter(scope="all").sort("top")["value"].to_list()
            of_relation = rows.filter(scope="relation", top=100).sort("name")
            assert values(spots(by_relation, f"{kind}, {how}")) == of_relation["value"].to_list()
        levels = {line.get_label(): line.get_ydata()[0] for line in overall.lines}
        active, every = {"routed": (0.5, 0.94), "shared": (0.45, 0.055)}[kind]
        assert levels[f"{kind}: share among active neurons"] == active
        assert levels[f"{kind}: share among all neurons"] == every
        colour = leading_plots.KINDS[kind].lower()
        upright = [c for c in by_relation.collections if to_hex(c.get_colors()[0]) == colour]
        assert {s[0, 0] for c in upright for s in c.get_segments() if s[0, 0] == s[1, 0]} == {active}


def test_overlaps_within_and_between_relations(drawn):
    table, names = neuron_overlap_table(), sorted(RELATIONS)
    for axes, kind in zip(panels(drawn("neuron_overlap")), ("all", "routed", "shared"), strict=True):
        rows = table.filter(kind=kind)
        samples = rows.filter(comparison="samples").sort("relation")
        assert values(spots(axes, "two prompts of the relation")) == samples["value"].to_list()
        assert intervals(axes, drawing.VERMILLION) == samples.select("low", "high").rows()
        strangers = rows.filter(comparison="strangers")
        assert spots(axes, "two prompts of different relations") == [(0, strangers["value"][0])]
        between = [
            (1 + names.index(r[end]), r["value"])
            for r in rows.filter(comparison="relations").iter_rows(named=True)
            for end in ("relation", "other")
        ]
        assert spots(axes, "the relation and another one") == sorted(between)
        assert ticks(axes, "chance of two prompts") == [rows["chance"][0]] * 13
    assert "different relations" not in said(drawn("neuron_overlap, one relation"))


# --- heads and experts ------------------------------------------------------------------------------------------------


def test_found_and_tested_pairs_against_the_null(drawn):
    figure = drawn("association")
    for title, fold in (("Found on all 453 prompts", None), ("Found outside fold 1 (453)", 1)):
        axes = panel(figure, title)
        rows = associations_table().filter(pl.col("relation").is_null(), pl.col("fold").eq_missing(fold))
        rows = rows.sort(pl.col("r").abs(), descending=True)
        up, down = rows.filter(pl.col("r") > 0), rows.filter(pl.col("r") < 0)
        assert values(spots(axes, "r where found, above 0")) == up["r"].to_list()
        assert values(spots(axes, "below 0")) == [-r for r in down["r"]]
        assert next(iter(heights(axes))) == "H3.0 > E12.0"
        assert ticks(axes, "median of the largest |r| of unrelated pairs") == [0.5]
        assert ticks(axes, "95% of the largest |r| of unrelated pairs") == [0.62]
        tested = values(spots(axes, coupling_plots.TESTED.label))
        assert tested == pytest.approx(
            [] if fold is None else [0.6 * abs(r) if i != 4 else -0.1 for i, r in enumerate(rows["r"])]
        )
    assert "left of 288,000, right of 9 pairs" in said(figure)


def test_the_three_strongest_of_every_relation(drawn):
    axes = panel(drawn("association"), "Leading pairs by relation")
    table = associations_table().filter(pl.col("relation").is_not_null()).with_columns(size=pl.col("r").abs())
    expected = [
        table.filter(relation=name)["size"].top_k(3).sort(descending=True).to_list() for name in sorted(RELATIONS)
    ]
    found = sorted(spots(axes, "r where found, above 0") + spots(axes, "below 0"))
    assert values(found) == list(itertools.chain(*expected))
    assert len(ticks(axes, "95% of the largest |r| of unrelated pairs")) == 12
    assert len(axes.get_yticks()) == 48


def test_causality_beside_its_controls(drawn):
    table = causality_table().filter(pl.col("gate_layer").is_null())
    pair = ("head_layer", "head", "layer", "expert", "fold", "sign")
    for name, (title, *_) in coupling_plots.EFFECTS.items():
        axes = panel(drawn("causality"), title)
        rows = table.filter(quantity=name).sort(pair, nulls_last=False)
        assert values(spots(axes, "the pair")) == rows["value"].to_list()
        assert intervals(axes, drawing.VERMILLION) == rows.select("low", "high").rows()
        if name == "gradient_share":
            assert ticks(axes, "chance (1 / heads of the layer)") == [1 / 16] * 23
            assert not spots(axes, "control")
        else:
            assert values(spots(axes, "control")) == rows["control_value"].to_list()
            assert intervals(axes, drawing.BLUE) == rows.select("control_low", "control_high").rows()
    labels = heights(panels(drawn("causality"))[0])
    assert list(labels)[:4] == ["all pairs", "r > 0", "r < 0", "H3.0 > E12.0 (-) · 0"]
    assert list(labels)[4:6] == ["H3.0 > E13.0 · 1", "H3.1 > E13.7 · 0"]
    assert sum("(-)" in label for label in labels) == 7
    assert "tested on this fold" in said(drawn("causality"))
    assert "(-): r < 0" in said(drawn("causality"))


def test_pairs_of_one_sign_are_all_pairs(drawn):
    figure = drawn("causality, one sign")
    assert list(heights(panels(figure)[0])) == ["all pairs", "H3.0 > E12.0 · 0", "H3.1 > E13.7 · 0"]
    assert "(-)" not in said(figure)


def test_forcing_stands_beside_no_forcing(drawn):
    rows = causality_table().filter(quantity="mrr_drop").sort("head", "layer", "fold", "sign", nulls_last=False)
    found = spots(panel(drawn("causality"), "Expert forced"), "the pair, its expert not forced")
    assert values(found) == pytest.approx([1 - drop for drop in rows["value"]])


def test_named_pairs_without_controls(drawn):
    words = said(drawn("causality, one subject"))
    assert "control" not in words
    assert "fold" not in words
    assert "H3.0 > E12.0" in words


# --- nothing to show --------------------------------------------------------------------------------------------------


def nulled(table):
    return table.with_columns(pl.lit(None, dtype=pl.Float64).alias("value"))


EMPTY = {
    "efficiency": (nulled(efficiency_table()), "score a checkpoint"),
    "gain_curves": ({}, "score a checkpoint"),
    "relation_accuracy": (relation_accuracy_table(relations=()), "score a checkpoint"),
    "budget": (budgets_table().clear(), "name some in collaboration.budgets"),
    "blocking": (nulled(blocking_table()), "no loss is available"),
    "expert_overlap": (expert_overlap_table(methods=METHODS[:1], published=False), "second method"),
    "association": (associations_table().clear(), "add facts"),
    "causality": (nulled(causality_table()), "ask facts that the model knows"),
    "neuron_types": (neuron_types_table(kinds=("routed",)), "one kind"),
    "neuron_overlap": (nulled(neuron_overlap_table()), "add facts"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_show_is_said_with_the_cure(name):
    table, cure = EMPTY[name]
    with pytest.raises(drawing.PlotError, match=cure) as error:
        function_of(name)(table, "tiny")
    assert "tiny" in str(error.value)
    assert "\n" not in str(error.value)


STEPPED = ("budget", "blocking", "expert_overlap", "causality", "neuron_types", "neuron_overlap")


@pytest.mark.parametrize("name", STEPPED)
def test_of_several_checkpoints_the_last_is_drawn(name):
    table, title = FIGURES[name]()
    other = nulled(table) if "value" in table.columns else table.with_columns(common=pl.lit(0, dtype=pl.Int64))
    steps = [other.with_columns(step=pl.lit(step, dtype=pl.Int64)) for step in (None, 900)]
    steps.append(table.with_columns(step=pl.lit(1000, dtype=pl.Int64)))
    one = laid_out(function_of(name)(steps[-1], title))
    several = laid_out(function_of(name)(pl.concat(steps), title))
    assert "step 1,000" in said(several)
    assert said(several) == said(one)


CAVEATS = {
    "efficiency": ("add up", "shallower", "table and its prose"),
    "gain_curves": ("not equally wide", "exceed 1"),
    "relation_accuracy": ("first token", "letter relations"),
    "budget": ("never seen", "weights of the clean run"),
    "blocking": ("optimistic", "Matched", "not corrected for the number of cells"),
    "expert_overlap": ("stricter chance", "does not show that the experts matter"),
    "association": ("does not say that the head steers", "not their null"),
    "causality": ("only what lies between", "other heads", "marked (-)", "direction of"),
    "neuron_types": ("dashed line", "Shares of neurons"),
    "neuron_overlap": ("share their template", "not to be compared"),
}


@pytest.mark.parametrize(("figure", "caveats"), CAVEATS.items(), ids=CAVEATS.keys())
def test_every_caption_holds_its_caveats_and_is_well_formed(figure, caveats):
    assert_caption_warns(figure, caveats)
    text = (Path(drawing.__file__).parents[2] / "report" / f"{figure}.rst").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    body = publish_parts(text, writer="html5", settings_overrides={"halt_level": 2, "_disable_config": True})["body"]
    assert not [leftover for leftover in ("**", "``", "system-message", "HIT\\@10", "mailto") if leftover in body]
