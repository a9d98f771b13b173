"""The figures: they show their table, say what they show, nothing collides, and equal tables give equal bytes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from moescope import drawing, plots, tables
from tests.reading import assert_clear_of_data, assert_curve, assert_legible, panel, segments

RELATIONS = {
    "linguistic": ["adj_antonym", "word_first_letter", "word_last_letter"],
    "commonsense": ["object_superclass", "fruit_inside_color", "work_location"],
    "factual": ["country_language", "country_capital_city"],
    "bias": ["name_religion", "occupation_age", "occupation_gender", "name_birthplace"],
}
USER = {"user": ["a_relation_name_of_some_length_that_nobody_foresaw_in_the_design", "b", "C.3"]}
ONE = {"user": ["only"]}
MANY = {f"category {i}": [f"relation_{i}"] for i in range(11)}
STEPS = {
    1: [700],
    2: [0, 700],
    12: [0, 10, 16, 25, 40, 63, 100, 160, 250, 400, 500, 700],
    60: list(range(10_000, 610_000, 10_000)),
}
SUBSETS = ("all", "flagged", "unflagged", "seen", "held_out", *(f"exposure_{q}" for q in (1, 2, 3, 4)))


def rising(random, step, steps):
    """A value in (0, 1) that grows with the step, and an interval around it that is not symmetric."""
    value = 0.02 + 0.9 * (1 + steps.index(step)) / len(steps) * random.uniform(0.8, 1)
    return value, value * random.uniform(0.7, 0.95), min(1.0, value * random.uniform(1.02, 1.2))


def accuracy_table(steps, relations=RELATIONS, exposure=True):
    random, rows = np.random.default_rng(0), []
    for step, subset in itertools.product(steps, SUBSETS if exposure else SUBSETS[:3]):
        scopes = [("all", None), *(("category", name) for name in relations)]
        scopes += [("relation", name) for names in relations.values() for name in names]
        for (scope, name), metric in itertools.product(scopes, ("hit@1", "hit@10", "mrr", "log_prob")):
            for average in ("micro",) if scope == "relation" else ("micro", "macro"):
                rows.append((step, None, subset, scope, name, average, metric, *rising(random, step, steps), 241))
    schema = dict(tables.SCHEMAS["accuracy"].columns)
    return tables.check(pl.DataFrame(rows, schema=schema, orient="row"), "accuracy")


def importance_table(steps, layers=4):
    random, rows = np.random.default_rng(1), []
    for step, component in itertools.product(steps, ("attn", "ffn")):
        for label in [*(("layer", layer) for layer in range(layers)), ("mean", None), ("total", None)]:
            value, low, high = rising(random, step, steps)
            rows.append((step, None, *label, component, value - 0.3, low - 0.3, high - 0.3))
    schema = dict(tables.SCHEMAS["layer_importance"].columns)
    return tables.check(pl.DataFrame(rows, schema=schema, orient="row"), "layer_importance")


def experts_table(relations=RELATIONS, layers=16, experts=64):
    random, rows = np.random.default_rng(2), []
    names = [name for group in relations.values() for name in group]
    for name in names:
        for rank, value in enumerate(sorted(random.gamma(2, 0.1, size=5), reverse=True), start=1):
            layer, expert = random.integers(0, layers), random.integers(0, experts)
            other = value * random.uniform(-0.1, 0.4) if len(names) > 1 else None
            row = (700, name, rank, int(layer), int(expert), value, 0.6 * value, 1.2 * value)
            rows.append((*row, random.uniform(0.2, 1), other))
    schema = dict(tables.SCHEMAS["top_experts"].columns)
    return tables.check(pl.DataFrame(rows, schema=schema, orient="row"), "top_experts")


FIGURES = {
    **{f"accuracy, {n} steps": (plots.accuracy, accuracy_table(steps)) for n, steps in STEPS.items()},
    **{
        f"accuracy, {n} steps, no exposure": (plots.accuracy, accuracy_table(STEPS[n], exposure=False))
        for n in (1, 12, 60)
    },
    **{
        f"accuracy, {name}, {n} steps": (plots.accuracy, accuracy_table(STEPS[n], relations, exposure=False))
        for n in (1, 12)
        for name, relations in (("one relation", ONE), ("long names", USER), ("many", MANY))
    },
    **{f"layer importance, {n} steps": (plots.layer_importance, importance_table(s)) for n, s in STEPS.items()},
    **{
        f"layer profiles, {n} steps, {layers} layers": (plots.layer_profiles, importance_table(STEPS[n], layers))
        for n, layers in ((1, 4), (2, 1), (2, 4), (12, 4), (12, 48), (60, 16))
    },
    **{
        f"top experts, {name}": (plots.top_experts, experts_table(relations))
        for name, relations in (("12 relations", RELATIONS), ("one", ONE), ("long names", USER), ("11", MANY))
    },
}
figures = pytest.mark.parametrize(("draw", "table"), FIGURES.values(), ids=FIGURES.keys())


@pytest.fixture(scope="module")
def drawn():
    """Each figure drawn and laid out once."""
    made = {}

    def get(draw, table):
        if id(table) not in made:
            figure = draw(table, "tiny-olmoe")
            FigureCanvasAgg(figure).draw()
            made[id(table)] = figure
        return made[id(table)]

    return get


@figures
def test_no_text_overlaps_another_or_leaves_the_page(drawn, draw, table):
    assert_legible(drawn(draw, table))


@figures
def test_text_keeps_off_the_data(drawn, draw, table):
    assert_clear_of_data(drawn(draw, table))


@figures
def test_no_panel_is_empty_or_squeezed(drawn, draw, table):
    figure = drawn(draw, table)
    for axes in figure.axes:
        assert any(np.isfinite(line.get_ydata()).any() and len(line.get_xdata()) for line in axes.lines)
        inches = axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        assert inches.width > 1.0
        assert inches.height > 0.35


@figures
def test_axes_name_their_units(drawn, draw, table):
    figure = drawn(draw, table)
    units = ("nats", "share of prompts", "mean of 1/rank", "step", "layer")
    for axes in figure.axes:
        # panels in a grid share the labels of the first column and the last row
        labels = {a.get_xlabel() for a in figure.axes} if draw is plots.top_experts else {axes.get_xlabel()}
        assert any(unit in label for label in labels for unit in units)
        named = axes.get_ylabel() or [tick.get_text() for tick in axes.get_yticklabels()]
        assert named or draw is plots.layer_profiles or axes.get_shared_y_axes().joined(axes, figure.axes[0])
    assert "tiny-olmoe" in figure._suptitle.get_text()


@pytest.mark.parametrize("count", [2, 12, 60])
def test_accuracy_draws_its_table(drawn, count):
    draw, table = FIGURES[f"accuracy, {count} steps"]
    figure = drawn(draw, table)
    micro = table.filter(pl.col("average") == "micro")
    overall = micro.filter(pl.col("scope") == "all")
    for title, metric in (("HIT@10", "hit@10"), ("MRR", "mrr")):
        for label, subset in (("template seen", "seen"), ("template held out", "held_out")):
            rows = overall.filter(pl.col("subset") == subset, pl.col("metric") == metric)
            assert_curve(panel(figure, title), label, rows)
    hits = micro.filter(pl.col("metric") == "hit@10")
    for name in RELATIONS:
        rows = hits.filter(pl.col("subset") == "all", pl.col("scope") == "category", pl.col("name") == name)
        assert_curve(panel(figure, "HIT@10 by relation category, all prompts"), name, rows)
    for quarter in (1, 2, 3, 4):
        rows = hits.filter(pl.col("subset") == f"exposure_{quarter}", pl.col("scope") == "all")
        assert_curve(panel(figure, "HIT@10 by exposure, seen templates"), f"exposure quarter {quarter}", rows)


def test_accuracy_says_how_many_prompts_and_which_average(drawn):
    figure = drawn(*FIGURES["accuracy, 12 steps"])
    assert "micro" in figure._suptitle.get_text()
    assert all("(n = 241)" in text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts())


def test_accuracy_without_exposure_shows_all_prompts(drawn):
    draw, table = FIGURES["accuracy, 12 steps, no exposure"]
    figure = drawn(draw, table)
    assert len(figure.axes) == 3
    rows = table.filter(pl.col("subset") == "all", pl.col("scope") == "all", pl.col("average") == "micro")
    assert_curve(panel(figure, "HIT@10"), "all prompts", rows.filter(pl.col("metric") == "hit@10"))


def test_one_category_is_shown_by_relation_and_one_relation_not_at_all(drawn):
    draw, table = FIGURES["accuracy, long names, 12 steps"]
    axes = panel(drawn(draw, table), "HIT@10 by relation, all prompts")
    rows = table.filter(pl.col("subset") == "all", pl.col("name") == "b", pl.col("metric") == "hit@10")
    assert_curve(axes, "b (n", rows)
    assert len(drawn(*FIGURES["accuracy, one relation, 12 steps"]).axes) == 2


def test_one_checkpoint_is_a_list_of_points_with_intervals(drawn):
    draw, table = FIGURES["accuracy, 1 steps"]
    figure = drawn(draw, table)
    assert "step 700" in figure._suptitle.get_text()
    micro = table.filter(pl.col("average") == "micro")
    for axes, metric in zip(figure.axes, ("hit@10", "mrr"), strict=True):
        places = dict(zip([t.get_text() for t in figure.axes[0].get_yticklabels()], axes.get_yticks(), strict=True))
        assert len(places) == 2 + 4 + 12 + 4
        points = {round(float(line.get_ydata()[0]), 6): float(line.get_xdata()[0]) for line in axes.lines}
        rows = micro.filter(pl.col("metric") == metric)
        for label, wanted in (
            ("template held out (n = 241)", (pl.col("subset") == "held_out") & (pl.col("scope") == "all")),
            ("factual (n = 241)", (pl.col("subset") == "all") & pl.col("name").eq_missing("factual")),
            ("name birthplace (n = 241)", (pl.col("subset") == "all") & pl.col("name").eq_missing("name_birthplace")),
        ):
            row = rows.filter(wanted).row(0, named=True)
            place = round(places[label], 6)
            assert points[place] == pytest.approx(row["value"])
            assert segments(axes)[place] == pytest.approx((row["low"], row["high"]))


@pytest.mark.parametrize("count", [2, 12, 60])
def test_layer_importance_draws_the_means_over_layers(drawn, count):
    draw, table = FIGURES[f"layer importance, {count} steps"]
    (axes,) = drawn(draw, table).axes
    for label, component in (("attention", "attn"), ("FFN", "ffn")):
        rows = table.filter(pl.col("aggregate") == "mean", pl.col("component") == component)
        assert_curve(axes, label, rows)


@pytest.mark.parametrize(("count", "layers", "early"), [(2, 4, 0), (12, 4, 63), (60, 16, 50_000)])
def test_profiles_draw_early_last_and_all_others(drawn, count, layers, early):
    draw, table = FIGURES[f"layer profiles, {count} steps, {layers} layers"]
    figure = drawn(draw, table)
    last = STEPS[count][-1]
    for title, component in (("Attention", "attn"), ("FFN", "ffn")):
        axes = panel(figure, title)
        of_layers = table.filter(pl.col("aggregate") == "layer", pl.col("component") == component)
        for step, word in ((early, "early"), (last, "last")):
            assert_curve(axes, f"step {step:,} ({word})", of_layers.filter(pl.col("step") == step), over="layer")
        faint = [c for c in axes.collections if "other" in str(c.get_label())]
        assert sum(len(c.get_segments()) for c in faint) == count - 2
        for collection in faint:
            drawn_values = np.sort(np.concatenate([segment[:, 1] for segment in collection.get_segments()]))
            rest = of_layers.filter(~pl.col("step").is_in([early, last]))
            assert drawn_values == pytest.approx(np.sort(rest["value"].to_numpy()))
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_top_experts_draws_its_table(drawn):
    draw, table = FIGURES["top experts, 12 relations"]
    figure = drawn(draw, table)
    assert len(figure.axes) == 12
    for (relation,), rows in table.sort("rank").partition_by("relation", as_dict=True).items():
        axes = panel(figure, relation.replace("_", " "))
        _, mean, other = axes.lines
        assert np.asarray(mean.get_xdata()) == pytest.approx(rows["value"].to_numpy())
        assert np.asarray(other.get_xdata()) == pytest.approx(rows["elsewhere"].to_numpy())
        assert list(segments(axes).values()) == [pytest.approx(ends) for ends in rows.select("low", "high").rows()]
        names = [f"L{layer}·E{expert}" for layer, expert in rows.select("layer", "expert").rows()]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == names
        assert [text.get_text() for text in axes.texts] == [f"{100 * share:.0f}%" for share in rows["routed"]]
        assert axes.yaxis_inverted()  # the first rank on top


def test_a_single_relation_has_no_marker_for_the_others(drawn):
    legend = drawn(*FIGURES["top experts, one"]).legends[0]
    assert not any("other" in text.get_text() for text in legend.get_texts())


@pytest.mark.parametrize("count", [2, 12, 60])
def test_the_step_axis_shows_every_checkpoint_and_names_its_scale(drawn, count):
    axes = drawn(*FIGURES[f"layer importance, {count} steps"]).axes[0]
    steps = STEPS[count]
    assert axes.get_xlim()[0] < steps[0] < steps[-1] < axes.get_xlim()[1]
    assert {steps[0], steps[-1]} <= set(axes.get_xticks())
    assert "log scale" in axes.get_xlabel()
    places = axes.transData.transform([(step, 0) for step in steps])[:, 0]
    assert (np.diff(places) > 0.5).all()
    assert ("linear below" in axes.get_xlabel()) == (steps[0] == 0)


def test_ticks_are_written_short():
    assert [drawing.short(step) for step in (0, 700, 5000, 12_500, 1_220_000)] == ["0", "700", "5K", "12.5K", "1.22M"]


def test_values_without_interval_are_drawn_without_band():
    bare = [pl.lit(None, dtype=pl.Float64).alias(end) for end in ("low", "high")]
    for draw, table in (
        (plots.layer_importance, importance_table(STEPS[12]).with_columns(bare)),
        (plots.accuracy, accuracy_table(STEPS[12]).with_columns(bare)),
    ):
        figure = draw(table, "tiny")
        FigureCanvasAgg(figure).draw()
        assert all(axes.lines for axes in figure.axes)
        assert not any(axes.collections for axes in figure.axes)


@pytest.mark.parametrize("draw", [plots.accuracy, plots.layer_importance, plots.layer_profiles])
def test_main_stands_alone_or_not_at_all(draw):
    make = accuracy_table if draw is plots.accuracy else importance_table
    nameless = make([700]).with_columns(step=pl.lit(None, dtype=pl.Int64))
    assert draw(nameless, "x")._suptitle.get_text().endswith("main")
    together = draw(pl.concat([make(STEPS[12]), nameless]), "x")
    drawn_steps = {x for line in together.axes[0].lines if len(line.get_xdata()) == 12 for x in line.get_xdata()}
    assert drawn_steps == (set(STEPS[12]) if draw is not plots.layer_profiles else set())


@pytest.mark.parametrize("draw", [plots.accuracy, plots.layer_importance, plots.layer_profiles, plots.top_experts])
def test_an_empty_table_is_refused(draw):
    table = {plots.accuracy: accuracy_table, plots.top_experts: experts_table}.get(draw, importance_table)
    empty = table(RELATIONS) if draw is plots.top_experts else table([1])
    with pytest.raises(drawing.PlotError, match="is empty"):
        draw(empty.clear(), "x")


def test_names_are_not_read_as_formulas():
    table = accuracy_table(STEPS[12], {"cost in $": ["a"], "$x_1$": ["b"]}, exposure=False)
    figure = plots.accuracy(table, "tiny")
    FigureCanvasAgg(figure).draw()
    labels = figure.axes[2].get_legend().get_texts()
    assert [label.get_text() for label in labels] == ["$x 1$ (n = 241)", "cost in $ (n = 241)"]
    assert not any(label.get_parse_math() for label in labels)


def colours(figure):
    return {to_hex(line.get_color()) for axes in figure.axes for line in axes.lines}


def test_eleven_groups_look_different(drawn):
    axes = panel(drawn(*FIGURES["accuracy, many, 12 steps"]), "HIT@10 by relation category, all prompts")
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == len(axes.lines) == 11


def luminance(colour):
    channels = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_ordered_groups_grow_lighter(drawn):
    axes = panel(drawn(*FIGURES["accuracy, 12 steps"]), "HIT@10 by exposure, seen templates")
    shades = [luminance(line.get_color()) for line in axes.lines]
    assert shades == sorted(shades)
    assert min(np.diff(shades)) > 0.05


LIBRARY = {**os.environ, "PYTHONPATH": str(Path(plots.__file__).parents[1])}
SAVE = """
import sys, polars as pl
from moescope import drawing, plots
draw = getattr(plots, sys.argv[1])
drawing.save(draw(pl.read_parquet(sys.argv[2]), "tiny"), sys.argv[3] + ".pdf", sys.argv[3] + ".png")
"""


@pytest.mark.parametrize("name", ["accuracy", "top_experts"])
def test_equal_tables_give_equal_bytes(name, tmp_path):
    """On another day, with another hash seed, and after someone changed matplotlib's settings."""
    table = accuracy_table(STEPS[12]) if name == "accuracy" else experts_table()
    table.write_parquet(tmp_path / "table.parquet")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "pdf.compression": 0, "savefig.dpi": 30}):
        drawing.save(getattr(plots, name)(table, "tiny"), tmp_path / "here.pdf", tmp_path / "here.png")
    environment = {**LIBRARY, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1000000000"}
    command = [sys.executable, "-c", SAVE, name, str(tmp_path / "table.parquet"), str(tmp_path / "there")]
    subprocess.run(command, env=environment, check=True)
    for ending in ("pdf", "png"):
        assert (tmp_path / f"here.{ending}").read_bytes() == (tmp_path / f"there.{ending}").read_bytes()
    assert b"CreationDate" not in (tmp_path / "here.pdf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "here.pdf",
        "here.png",
        "table.parquet",
        "there.pdf",
        "there.png",
    ]


def test_a_figure_that_cannot_be_saved_leaves_the_old_one(tmp_path):
    good = tmp_path / "good.pdf", tmp_path / "good.png"
    drawing.save(plots.layer_importance(importance_table([1]), "x"), *good)
    before = [path.read_bytes() for path in good]
    too_large = Figure(figsize=(50_000, 1))
    with pytest.raises(ValueError, match="too large"):
        drawing.save(too_large, tmp_path / "other.pdf", good[1])
    assert [path.read_bytes() for path in good] == before


def test_drawing_touches_no_global_state():
    before = dict(matplotlib.rcParams)
    plots.top_experts(experts_table(), "x")
    assert dict(matplotlib.rcParams) == before
    code = "import sys, moescope.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=LIBRARY, check=False).returncode == 0
