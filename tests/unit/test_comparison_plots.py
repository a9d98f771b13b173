"""The figures of several series: they show their tables, say what comes of them, and nothing collides."""

import itertools

import polars as pl
import pytest
from matplotlib.colors import to_hex

from moescope import comparison_plots
from tests.reading import (
    assert_curve,
    assert_presentable,
    bands,
    laid_out,
    panels,
    said,
)
from tests.unit.dynamics_tables import (
    COMPONENTS,
    LONG,
    STEPS,
    assert_axis_is_checked,
    assert_caption_warns,
    assert_needs_two,
    drawn_once,
    importance_table,
    neuron_table,
    of,
    similarity_table,
    sparsity_tables,
)


def comparison(steps, names=("tiny-olmoe", "tiny-olmo", "tiny-qwen2-moe"), axis="log", **options):
    steps = STEPS[steps]
    seeds = {name: seed for seed, name in enumerate(names)}
    return comparison_plots.comparison(
        {name: neuron_table(steps, moe="moe" in name, seed=seed, **options) for name, seed in seeds.items()},
        {name: importance_table(steps, seed) for name, seed in seeds.items()},
        {name: similarity_table(steps, seed=seed) for name, seed in seeds.items()},
        axis,
    )


def sparsity(steps, names=("tiny-olmoe", "tiny-olmo"), axis="log", pairs=1, **options):
    neurons = {names[0]: neuron_table(STEPS[steps], **options)}
    neurons[names[1]] = neuron_table(STEPS[steps], moe=False, seed=1, masked=True, **options)
    table, verdict = sparsity_tables(*names)
    if pairs == 2:
        neurons["second-dense"] = neurons[names[1]]
        more = sparsity_tables(names[0], "second-dense")
        table, verdict = pl.concat([table, more[0]]), pl.concat([verdict, more[1]])
    return comparison_plots.sparsity(table, verdict, neurons, axis)


FIGURES = {
    **{f"comparison, {n}": (comparison, n, {}) for n in (12, 244)},
    "comparison, long names": (comparison, 2, {"names": (LONG, "b", *(f"moe-{i}" for i in range(8))), "axis": "step"}),
    "sparsity, 12": (sparsity, 12, {}),
    "sparsity, two pairs": (sparsity, 16, {"pairs": 2, "names": (f"{LONG}-moe", LONG), "axis": "tokens"}),
}

drawn = drawn_once(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_can_be_read(drawn, name):
    names = FIGURES[name][2].get("names", ["tiny-olmoe"])
    assert_presentable(drawn(name), "Series" if name.startswith("comparison") else names[0])


def test_series_keep_their_colours(drawn):
    looks, figure = set(), drawn("comparison, 12")
    for seed, name in enumerate(("tiny-olmoe", "tiny-olmo", "tiny-qwen2-moe")):
        neurons = neuron_table(STEPS[12], moe="moe" in name, seed=seed).filter(population="all")
        lines = [
            neurons.filter(metric="jaccard"),
            neurons.filter(metric="gain_share"),
            importance_table(STEPS[12], seed),
            similarity_table(STEPS[12], seed=seed).filter(metric="to_final"),
        ]
        for axes, (rows, component) in zip(panels(figure), itertools.product(lines, COMPONENTS), strict=True):
            (line,) = [line for line in axes.lines if line.get_label() == name]
            rows = rows.filter(component=component).sort("step")
            assert line.get_xdata().tolist() == rows["step"].to_list()
            assert line.get_ydata() == pytest.approx(rows["value"].to_numpy())
            wanted = {step: pytest.approx(ends) for step, *ends in rows.select("step", "low", "high").iter_rows()}
            assert wanted in bands(axes, to_hex(line.get_color()))
            looks.add((name, to_hex(line.get_color())))
    assert len(looks) == 3


def test_ten_series_look_different(drawn):
    axes = panels(drawn("comparison, long names"))[0]
    series = [line for line in axes.lines if not line.get_label().startswith(("_", "random"))]
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in series}
    assert len(looks) == 10


def test_sparsity_holds_the_series_against_each_other(drawn):
    figure = drawn("sparsity, 12")
    moe, dense = neuron_table(STEPS[12]), neuron_table(STEPS[12], moe=False, seed=1, masked=True)
    populations = (("all", "all"), ("all", "masked"), ("prompt", "prompt"), ("matched", "matched"))
    for row, (of_moe, of_dense) in enumerate(populations):
        last = "effective_share" if row == 2 else "positive_share"
        middle = "positive_share" if row == 2 else "gain_share"
        for axes, metric in zip(panels(figure)[3 * row :][:3], ("jaccard", middle, last), strict=True):
            assert_curve(axes, "tiny-olmoe (MoE)", of(moe, "ffn", metric, of_moe))
            assert_curve(axes, "tiny-olmo (dense)", of(dense, "ffn", metric, of_dense))
    first = panels(figure)[0]
    assert_curve(first, "N1: J expected given layer × expert", of(moe, "ffn", "jaccard_given_expert"))
    assert_curve(first, "N1: J expected given the layer", of(dense, "ffn", "jaccard_given_layer"))


def test_sparsity_says_differences_and_verdicts(drawn):
    words = said(drawn("sparsity, 12"))
    assert words.count("Δ +0.12 [0.04, 0.20]: exceeds") == 6
    assert words.count("Δ over N1 +0.12 [0.04, 0.20]: exceeds") == 1
    assert words.count("Δ −0.018 [−0.043, 0.011]: not above") == 5  # of N3, gain and importance are one
    for claim in ("Stability", "Gain", "Importance"):
        assert f"{claim}: not beyond sparsity. The mixture of experts exceeds the dense model under the same" in words
    assert (
        "The top set of N4 of tiny-olmoe holds 5.12 neurons only: one more in common moves its J by up to 0.20."
        in words
    )
    assert words.count("one more in common") == 1


def test_a_difference_below_0_is_said_to_be_below():
    table, verdict = sparsity_tables()
    table = table.with_columns(difference_high=pl.when(test="N4").then(-0.002).otherwise("difference_high"))
    neurons = {"tiny-olmoe": neuron_table(STEPS[2]), "tiny-olmo": neuron_table(STEPS[2], moe=False)}
    titles = [axes.get_title(loc="left") for axes in panels(comparison_plots.sparsity(table, verdict, neurons))]
    assert sum("−0.002]: below" in title for title in titles) == 3


def test_without_groups_nothing_is_said_of_differences():
    table, verdict = sparsity_tables()
    unknown = [pl.lit(None, dtype=pl.Float64).alias(f"difference_{end}") for end in ("value", "low", "high")]
    neurons = {"tiny-olmoe": neuron_table(STEPS[12], groups=False)}
    neurons["tiny-olmo"] = neuron_table(STEPS[12], moe=False, groups=False)
    table = table.with_columns(*unknown, exceeds=pl.lit(None, dtype=pl.Boolean))
    verdict = verdict.with_columns(beyond_sparsity=pl.lit(None, dtype=pl.Boolean))
    figure = laid_out(comparison_plots.sparsity(table, verdict, neurons))
    assert said(figure).count("Δ") == 1
    assert "Stability: undecided." in said(figure)
    assert len(panels(figure)) == 9  # without masked sums no N2
    assert not any(axes.collections for axes in panels(figure))


@pytest.mark.parametrize("draw", [comparison, sparsity])
def test_one_checkpoint_is_refused_in_one_line(draw):
    assert_needs_two(draw)


@pytest.mark.parametrize("draw", [comparison, sparsity])
def test_unknown_tokens_are_refused_with_the_cure(draw):
    assert_axis_is_checked(draw)


WARNINGS = {
    "comparison": ("data", "number of steps", "complementary by accounting", "pointwise"),
    "sparsity": ("trained without them", "data mix", "N2, N3 and N4", "pointwise"),
}


@pytest.mark.parametrize(("figure", "warnings"), WARNINGS.items(), ids=WARNINGS.keys())
def test_every_caption_holds_its_caveats(figure, warnings):
    assert_caption_warns(figure, warnings)
    assert callable(getattr(comparison_plots, figure))
