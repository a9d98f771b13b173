"""The figures of study dynamics: they show their tables, say what they show, and nothing collides."""

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

from moescope import drawing, dynamics_plots, tables
from tests.reading import (
    assert_clear_of_data,
    assert_curve,
    assert_legible,
    bands,
    lines,
    panel,
    parts,
    segments,
    texts,
)

STEPS = {
    1: [800],
    2: [0, 800],
    12: [0, 8, 13, 20, 32, 50, 80, 127, 201, 318, 505, 800],
    16: [*range(10_000, 80_000, 10_000), *range(100_000, 700_000, 100_000), 800_000, 1_000_000, 1_220_000],
    244: [5_000 * i for i in range(1, 245)],
}
LONG = "a-series-with-a-name-of-some-length.that-nobody-foresaw-in-the-design"
READINGS = ("gain_share", "gain_share_layer", "gain_share_by_importance", "gain_share_by_importance_layer")
PAIRED = ("jaccard", "survival", *READINGS)
DOSES = ("0.1%", "0.3%", "1%", "3%")


def made(rows, name):
    """Rows (dicts) as a checked table; columns that are left out are null."""
    columns = tables.SCHEMAS[name].columns
    frame = pl.DataFrame([{c: row.get(c) for c in columns} for row in rows], schema=dict(columns))
    return tables.check(frame, name)


def interval(value, random, groups=True):
    """A value with an interval that is not symmetric, or without."""
    width = abs(value) * random.uniform(0.05, 0.2) + 0.002
    return {"value": value, "low": value - width if groups else None, "high": value + 1.3 * width if groups else None}


def tokens_of(step):
    return 4_194_304 * step


def course(steps, start, end, random, noise=0.02):
    """A value for every step that moves from start to end."""
    return [start + (end - start) * i / max(1, len(steps) - 1) + random.normal(0, noise) for i in range(len(steps))]


def neuron_table(steps, moe=True, groups=True, tokens=True, seed=0, masked=False):
    random, rows = np.random.default_rng(seed), []

    def add(component, population, metric, start, end, noise=0.01, bands=groups):
        over = steps[1:] if metric.startswith(PAIRED) or metric.split("_")[0] in PAIRS else steps
        values = course(over, start, end, random, noise)
        for step, value in zip(over, values, strict=True):
            rows.append(
                {
                    "component": component,
                    "population": population,
                    "average": "micro",
                    "metric": metric,
                    "step_from": steps[steps.index(step) - 1] if over is not steps else None,
                    "step": step,
                    "tokens": tokens_of(step) if tokens else None,
                    **interval(max(value, 0.001), random, bands),
                }
            )

    up = 0.1 if moe else 0.0
    for component in ("ffn", "attn"):
        add(component, "all", "jaccard", 0.1 + up, 0.35 + up, 0.03)
        add(component, "all", "survival", 0.2 + up, 0.5 + up)
        add(component, "all", "positive_share", 0.2 + up, 0.3 + up)
        for i, reading in enumerate(READINGS):
            add(component, "all", reading, 0.45 - 0.07 * i, 0.3 - 0.05 * i)
            if groups:
                add(component, "all", f"{reading}_crossfit", 0.38 - 0.07 * i, 0.24 - 0.05 * i)
        if groups:
            add(component, "all", "ceiling", 0.55, 0.75)
            add(component, "all", "cross_half", 0.1, 0.28)
            add(component, "all", "reliability", 0.2, 0.4)
        if moe or component == "attn":
            add(component, "all", "jaccard_given_expert", 0.05, 0.12, 0.005)
            add(component, "all", "excess_given_expert", 0.05, 0.12, 0.005)
        add(component, "all", "jaccard_given_layer", 0.01, 0.03, 0.002)
        add(component, "all", "excess_given_layer", 0.1, 0.3)
        for metric, level in (("positive_share", 0.1), ("effective_share", 0.4), ("jaccard", 0.3)):
            add(component, "prompt", metric, level + up, level + 0.1 + up)
    for population in (["matched"] if moe else []) + (["masked"] if masked else []):
        for metric, level in (("jaccard", 0.15), ("positive_share", 0.2), ("gain_share", 0.3)):
            add("ffn", population, metric, level, level + 0.1)
    return made(rows, "neuron_dynamics")


PAIRS = ("jaccard", "cross", "reliability", "excess")


def overlap_table(steps, identical=()):
    rows = []
    for component, (i, early), (j, late) in itertools.product(("attn", "ffn"), enumerate(steps), enumerate(steps)):
        if early < late:
            same = (early, late) in identical
            survival = 1.0 if same else 0.7 * np.exp(-0.08 * (j - i)) * (0.4 + 0.6 * i / len(steps))
            row = {"component": component, "step_from": early, "step": late, "identical": same}
            rows.append({**row, "survival": survival, "jaccard": survival / (2 - survival)})
    return made(rows, "overlap")


def similarity_table(steps, groups=True, tokens=True, seed=0):
    random, rows = np.random.default_rng(seed), []
    for component, metric in itertools.product(("attn", "ffn"), ("to_final", "to_previous", "to_previous_spearman")):
        over = steps[:-1] if metric == "to_final" else steps[1:]
        for i, step in enumerate(over):
            value = min(1.0, 1 - 0.9 * np.exp(-5 * (i + 1) / len(over)) * random.uniform(0.3, 1.5))
            ends = {"low": value - 0.3 * (1 - value), "high": min(1.0, value + 0.2 * (1 - value))} if groups else {}
            row = {"component": component, "metric": metric, "step": step, "value": value, **ends}
            rows.append({**row, "tokens": tokens_of(step) if tokens else None})
    return made(rows, "profile_similarity")


def layer_table(steps, groups=True):
    rows = []
    for component, window in itertools.product(("attn", "ffn"), ("all", "10-70")):
        base = {"component": component, "window": window, "checkpoints": len(steps)}
        ends = {"low": 0.83, "high": 0.95} if groups else {}
        rows.append({**base, "metric": "consistency", "value": 0.912, **ends})
        for place, threshold in zip((0.5, 0.6, 0.8), ("0.9", "0.95", "0.99"), strict=True):
            at = int(place * (len(steps) - 1))
            ends = {"low": steps[max(0, at - 1)], "high": steps[min(len(steps) - 1, at + 1)]} if groups else {}
            rows.append({**base, "metric": f"consolidation_{threshold}", "value": steps[at], **ends})
    return made(rows, "layer_dynamics")


def robustness_table(steps, tiny=True, groups=True, unavailable=(), tokens=True, rankings=("signed",)):
    random, rows = np.random.default_rng(3), []
    sizes = {("head", "1"): 0.05, ("head", "10"): 0.3, ("head", "1%"): 0.08}
    sizes |= {("ffn_neuron", size): level for size, level in zip(DOSES, (0.05, 0.15, 0.4, 0.7), strict=True)}
    conditions = [(r, "none", x, 1.0 if x else 1.15) for r in rankings for x in (True, False)]
    conditions += [(r, "matched", True, 0.45) for r in rankings] + [(None, "random", False, 0.1)]
    for ((site, size), level), (ranking, control, crossfit, part) in itertools.product(sizes.items(), conditions):
        if not groups and (crossfit or control == "matched") and site != "head":
            continue
        dose = float(size.rstrip("%")) / 100
        for (i, step), metric in itertools.product(enumerate(steps), ("hit@10", "mrr", "log_prob")):
            scale = 5.0 if metric == "log_prob" else 1.0
            value = scale * level * part * (1.2 - 0.4 * i / len(steps)) * random.uniform(0.85, 1.15)
            known = metric == "log_prob" or step not in unavailable
            row = {"step": step, "tokens": tokens_of(step) if tokens else None, "site": site, "size": size}
            row |= {"ranking": ranking, "control": control, "crossfit": crossfit, "scope": "all", "average": "micro"}
            row |= {"metric": metric, "clean": 0.8, "ablated": 0.4, "prompts": 906, "seeds": 5}
            row |= interval(value, random, groups) if known else {}
            row |= {"units": 1, "degenerate": tiny and size != "1"}
            if site == "ffn_neuron":
                removed = 9 * dose if part > 0.5 else 2 * dose * part
                row |= {"units": int(4096 * dose), "degenerate": False, "removed": removed}
            rows.append(row)
    return made(rows, "robustness")


def faithfulness_table(kinds=("routed",), layers=4):
    random = np.random.default_rng(4)
    rows, per_kind = [], 400 // len(kinds)
    for kind, neuron in itertools.product(kinds, range(per_kind)):
        lpi = float(random.standard_t(2) * 1e-3)
        row = {"layer": neuron % layers, "kind": kind, "expert": neuron % 8 if kind == "routed" else None}
        row |= {"neuron": neuron, "active": 50, "gradient": lpi, "magnitude": abs(lpi)}
        rows.append({**row, "lpi": lpi, "effect": 0.8 * lpi + float(random.normal(0, 4e-4))})
    return made(rows, "faithfulness")


def scores_table(steps, kinds=("routed",), groups=True, tokens=True):
    random, rows = np.random.default_rng(5), []
    levels = {"lpi": 0.85, "gradient": 0.7, "magnitude": 0.2, "random": 0.0}
    for step, kind, (score, level) in itertools.product(steps, ("all", *kinds), levels.items()):
        ends = {"low": level - 0.1, "high": level + 0.06} if groups else {}
        row = {"step": step, "tokens": tokens_of(step) if tokens else None, "kind": kind, "score": score}
        rows.append({**row, "value": level + random.normal(0, 0.02), **ends, "neurons": 400})
    return made(rows, "score_faithfulness")


def importance_table(steps, seed=0):
    random, rows = np.random.default_rng(seed), []
    for component in ("attn", "ffn"):
        for step, value in zip(steps, course(steps, 0.05, 0.3, random), strict=True):
            row = {"step": step, "tokens": tokens_of(step), "aggregate": "mean", "component": component}
            rows.append({**row, **interval(value, random)})
    return made(rows, "layer_importance")


def sparsity_tables(moe="tiny-olmoe", dense="tiny-olmo"):
    rows, verdicts = [], []
    for claim, test in itertools.product(("stability", "gain", "importance"), ("plain", "N1", "N2", "N3", "N4")):
        if test != "N1" or claim == "stability":
            row = {"moe": moe, "dense": dense, "claim": claim, "test": test, "exceeds": test in ("plain", "N1", "N2")}
            difference = {"difference_value": 0.121, "difference_low": 0.043, "difference_high": 0.198}
            if test in ("N3", "N4"):
                difference = {"difference_value": -0.018, "difference_low": -0.043, "difference_high": 0.011}
            rows.append({**row, **difference})
    for claim in ("stability", "gain", "importance"):
        because = "The mixture of experts exceeds the dense model under the same routing (N2) and does not exceed the "
        because += "dense model among a prompt's active neurons (N3) or the dense model at the matched fraction (N4)."
        verdicts.append({"moe": moe, "dense": dense, "claim": claim, "beyond_sparsity": False, "because": because})
    return made(rows, "sparsity"), made(verdicts, "verdict")


def stability(steps, name="tiny-olmoe", axis="log", **options):
    return dynamics_plots.stability(neuron_table(STEPS[steps], **options), name, axis)


def concentration(steps, name="tiny-olmoe", axis="log", **options):
    return dynamics_plots.concentration(neuron_table(STEPS[steps], **options), name, axis)


def survival(steps, name="tiny-olmoe", **options):
    return dynamics_plots.survival(overlap_table(STEPS[steps], **options), name)


def consolidation(steps, name="tiny-olmoe", axis="log", **options):
    steps = STEPS[steps]
    layers = layer_table(steps, options.get("groups", True))
    return dynamics_plots.consolidation(similarity_table(steps, **options), layers, name, axis)


def some(steps):
    """Four of the steps, as ablation takes them."""
    steps = STEPS[steps]
    return [steps[i] for i in sorted({0, len(steps) // 3, 2 * len(steps) // 3, len(steps) - 1})]


def robustness(steps, name="tiny-olmoe", axis="log", **options):
    return dynamics_plots.robustness(robustness_table(some(steps), **options), name, axis)


def dose_response(steps, name="tiny-olmoe", **options):
    return dynamics_plots.dose_response(robustness_table(some(steps), **options), name)


def faithfulness(steps, name="tiny-olmoe", axis="log", kinds=("routed",), **options):
    scores = scores_table(some(steps), kinds, **options)
    return dynamics_plots.faithfulness(faithfulness_table(kinds), scores, name, axis)


def comparison(steps, names=("tiny-olmoe", "tiny-olmo", "tiny-qwen2-moe"), axis="log", **options):
    steps = STEPS[steps]
    seeds = {name: seed for seed, name in enumerate(names)}
    return dynamics_plots.comparison(
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
    return dynamics_plots.sparsity(table, verdict, neurons, axis)


FIGURES = {
    **{f"stability, {n}": (stability, n, {}) for n in (2, 12, 16, 244)},
    "stability, dense": (stability, 12, {"moe": False}),
    "stability, no groups": (stability, 2, {"groups": False, "name": LONG}),
    "stability, tokens": (stability, 16, {"axis": "tokens"}),
    **{f"concentration, {n}": (concentration, n, {}) for n in (2, 12, 244)},
    "concentration, no groups": (concentration, 12, {"groups": False, "axis": "step"}),
    **{f"survival, {n}": (survival, n, {}) for n in (2, 12, 244)},
    "survival, identical": (survival, 12, {"identical": {(8, 13), (505, 800)}, "name": LONG}),
    **{f"consolidation, {n}": (consolidation, n, {}) for n in (2, 12, 16, 244)},
    "consolidation, no groups": (consolidation, 12, {"groups": False, "axis": "tokens"}),
    "robustness": (robustness, 12, {"unavailable": (0,)}),
    "robustness, large": (robustness, 16, {"tiny": False, "name": LONG, "axis": "step"}),
    "robustness, no groups": (robustness, 12, {"groups": False}),
    "robustness, unavailable": (robustness, 12, {"unavailable": tuple(STEPS[12])}),
    "robustness, 1": (robustness, 1, {}),
    "robustness, 1, large": (robustness, 1, {"tiny": False}),
    "robustness, 1, unavailable": (robustness, 1, {"unavailable": (800,)}),
    "dose response": (dose_response, 12, {}),
    "dose response, no groups": (dose_response, 12, {"groups": False, "name": LONG}),
    "dose response, unavailable": (dose_response, 12, {"unavailable": tuple(STEPS[12])}),
    "faithfulness": (faithfulness, 12, {}),
    "faithfulness, kinds": (faithfulness, 12, {"kinds": ("routed", "shared")}),
    "faithfulness, 1": (faithfulness, 1, {"kinds": ("dense",), "groups": False}),
    "faithfulness, 1, kinds": (faithfulness, 1, {"kinds": ("routed", "shared"), "name": LONG}),
    **{f"comparison, {n}": (comparison, n, {}) for n in (2, 12, 244)},
    "comparison, long names": (comparison, 16, {"names": (LONG, "b", *(f"moe-{i}" for i in range(8))), "axis": "step"}),
    "sparsity, 12": (sparsity, 12, {}),
    "sparsity, 16": (sparsity, 16, {"names": (f"{LONG}-moe", LONG), "axis": "tokens"}),
    "sparsity, two pairs": (sparsity, 12, {"pairs": 2}),
}

figures = pytest.mark.parametrize("name", FIGURES)


@pytest.fixture(scope="module")
def drawn():
    """Each figure drawn and laid out once."""
    made = {}

    def get(name):
        if name not in made:
            draw, steps, options = FIGURES[name]
            made[name] = laid_out(draw(steps, **options))
        return made[name]

    return get


def laid_out(figure):
    FigureCanvasAgg(figure).draw()
    return figure


def panels(figure):
    """All panels, without the scales of colours beside them."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def said(figure):
    return " ".join(" ".join(text.split()) for text, _ in texts(figure))


@figures
def test_nothing_collides_or_leaves_the_page(drawn, name):
    figure = drawn(name)
    assert_legible(figure)
    assert_clear_of_data(figure)


@figures
def test_no_panel_is_empty_or_squeezed(drawn, name):
    for axes in panels(drawn(name)):
        shown = any(line.get_label()[0] != "_" and np.isfinite(line.get_ydata()).any() for line in axes.lines)
        assert shown or axes.images or axes.collections
        inches = axes.get_window_extent().transformed(axes.get_figure(root=True).dpi_scale_trans.inverted())
        assert inches.width > 1.0
        assert inches.height > 0.8


@figures
def test_titles_name_the_series_and_axes_their_units(drawn, name):
    figure = drawn(name)
    titles = "".join(part._suptitle.get_text() for part in parts(figure) if part._suptitle).replace("\n", "")
    names = FIGURES[name][2].get("name", "tiny-olmoe")
    assert name.startswith("comparison") or FIGURES[name][2].get("names", [names])[0] in titles
    below = {axes.get_xlabel() for axes in panels(figure)}
    assert any(unit in label for label in below for unit in ("step", "tokens", "%", "HIT@10", "nats"))


def random_line(axes, value):
    """Whether a horizontal line stands there, all across."""
    return any(list(line.get_xdata()) == [0, 1] and list(line.get_ydata()) == [value, value] for line in axes.lines)


COMPONENTS = {"ffn": "FFN", "attn": "Attention"}


def of(table, component, metric, population="all"):
    return table.filter(component=component, metric=metric, population=population)


@pytest.mark.parametrize("steps", [12, 244])
def test_stability_draws_ceiling_and_nulls(drawn, steps):
    figure, table = drawn(f"stability, {steps}"), neuron_table(STEPS[steps])
    for component, name in COMPONENTS.items():
        axes = panel(figure, name)
        assert_curve(axes, "J with the checkpoint before", of(table, component, "jaccard"))
        assert_curve(axes, "noise ceiling", of(table, component, "ceiling"))
        assert_curve(axes, "J across halves", of(table, component, "cross_half"))
        assert_curve(axes, "N1: J expected given the layer", of(table, component, "jaccard_given_layer"))
        assert_curve(axes, "N1: J expected given layer × expert", of(table, component, "jaccard_given_expert"))
        assert random_line(axes, pytest.approx(0.00503, abs=5e-6))


def test_a_dense_series_has_no_expectation_given_experts(drawn):
    assert "× expert" not in said(drawn("stability, dense"))
    assert "× head" in said(drawn("stability, dense"))


def test_concentration_draws_all_readings(drawn):
    figure, table = drawn("concentration, 12"), neuron_table(STEPS[12])
    for component, name in COMPONENTS.items():
        axes = panel(figure, name)
        assert_curve(axes, "R: share", of(table, component, "gain_share"))
        assert_curve(axes, "R, cross-fitted", of(table, component, "gain_share_crossfit"))
        assert_curve(axes, "share of the positive importance", of(table, component, "positive_share"))
        below = panel(figure, f"{name}: four readings of R")
        drawn_values = [line.get_ydata() for line in below.lines if line.get_label().startswith("ranked")]
        wanted = [of(table, component, f"{r}{end}")["value"] for end in ("", "_crossfit") for r in READINGS]
        assert [list(one) for one in drawn_values] == [pytest.approx(list(values)) for values in wanted]
        assert random_line(axes, 0.01)
        assert axes.get_xlim() == below.get_xlim()


def test_survival_fills_both_triangles_and_crosses_twins(drawn):
    steps, twins = STEPS[12], {(8, 13), (505, 800)}
    figure, table = drawn("survival, identical"), overlap_table(steps, twins)
    for component, name in COMPONENTS.items():
        axes = panel(figure, name)
        matrix = np.asarray(axes.images[0].get_array().filled(np.nan))
        assert np.isnan(np.diag(matrix)).all()
        for row in table.filter(component=component).iter_rows(named=True):
            i, j = steps.index(row["step_from"]), steps.index(row["step"])
            assert (matrix[i, j], matrix[j, i]) == (row["survival"], row["jaccard"])
        crossed = {(steps[int(y)], steps[int(x)]) for x, y in axes.lines[0].get_xydata()}
        assert crossed == twins | {(late, early) for early, late in twins}
        assert [tick.get_text() for tick in axes.get_xticklabels()][::-1] == [str(step) for step in steps]
    assert not any(axes.lines for axes in panels(drawn("survival, 12")))


@pytest.mark.parametrize(("name", "place"), [("consolidation, 16", int), ("consolidation, no groups", tokens_of)])
def test_consolidation_marks_where_it_settles(drawn, name, place):
    _, steps, options = FIGURES[name]
    steps = STEPS[steps]
    table, layers = similarity_table(steps, options.get("groups", True)), layer_table(steps)
    for component, title in COMPONENTS.items():
        (axes,) = [axes for axes in panels(drawn(name)) if axes.get_title(loc="left").startswith(title)]
        assert "consistency 0.91" in axes.get_title(loc="left")
        for label, metric in (("r with the last", "to_final"), ("r with the profile", "to_previous")):
            rows = table.filter(component=component, metric=metric)
            x, y, _ = lines(axes, label)
            assert x.tolist() == [place(step) for step in rows["step"]]
            assert y == pytest.approx(rows["value"].to_numpy())
        marks = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == "D"]
        rows = layers.filter(component=component, window="all").filter(pl.col("metric").str.contains("consolidation"))
        wanted = [(place(step), float(metric[14:])) for metric, step in rows.select("metric", "value").iter_rows()]
        assert [tuple(mark) for mark in marks] == [
            pytest.approx(mark) for mark in sorted(wanted, key=lambda one: one[1])
        ]


def test_the_stretched_scale_can_be_read_back():
    r = np.array([-1, -0.3, 0, 0.5, 0.9, 0.99, 1.0])
    assert dynamics_plots._unstretch(dynamics_plots._stretch(r)) == pytest.approx(r)
    assert (np.diff(dynamics_plots._stretch(r)) > 0).all()


CONDITIONS = {
    "largest mean LPI, cross-fitted": {"ranking": "signed", "control": "none", "crossfit": True},
    "largest mean LPI, in-sample": {"ranking": "signed", "control": "none", "crossfit": False},
    "matched control": {"ranking": "signed", "control": "matched"},
    "random control": {"control": "random"},
}


def test_robustness_draws_selection_and_controls(drawn):
    steps = some(16)
    table = robustness_table(steps, tiny=False).filter(metric="hit@10")
    titles = {"Top-1 head": ("head", "1"), "Top-10 heads": ("head", "10")}
    titles |= {"Top-1% of heads (1)": ("head", "1%"), "Top-1% of FFN neurons (40)": ("ffn_neuron", "1%")}
    for title, (site, size) in titles.items():
        axes = panel(drawn("robustness, large"), title)
        for label, wanted in CONDITIONS.items():
            assert_curve(axes, label, table.filter(site=site, size=size, **wanted))


def test_degenerate_interventions_are_named_and_not_drawn(drawn):
    for name in ("robustness", "robustness, 1"):
        assert "top-10 heads, top-1% of heads." in said(drawn(name))
    assert [axes.get_title(loc="left") for axes in panels(drawn("robustness"))] == [
        "Top-1 head",
        "Top-1% of FFN neurons (40)",
    ]
    table = robustness_table([800]).with_columns(degenerate=True)
    with pytest.raises(drawing.PlotError, match="every intervention is degenerate"):
        dynamics_plots.robustness(table, "tiny")


def test_steps_without_a_drop_are_crossed(drawn):
    for axes in panels(drawn("robustness")):
        assert "HIT@10" in said(drawn("robustness"))
        x, _, _ = lines(axes, "not available")
        assert x.tolist() == [0]
        _, y, _ = lines(axes, "random control")
        assert np.isnan(y).tolist() == [True, False, False, False]
    table = robustness_table(some(12), unavailable=tuple(STEPS[12])).filter(metric="log_prob", site="head", size="1")
    gone = drawn("robustness, unavailable")
    assert_curve(panel(gone, "Top-1 head"), "random control", table.filter(control="random"))
    assert "drop of log p(target) (nats)" in said(gone)
    assert "Clean HIT@10 is below 0.1 at every step" in said(gone)
    assert "(nats)" in said(drawn("robustness, 1, unavailable"))


def test_one_checkpoint_is_a_list_of_drops(drawn):
    (axes,) = panels(drawn("robustness, 1, large"))
    table = robustness_table([800], tiny=False).filter(metric="hit@10", site="ffn_neuron", size="1%")
    places = dict(zip([tick.get_text() for tick in axes.get_yticklabels()], axes.get_yticks(), strict=True))
    assert len(places) == 16
    for label, wanted in CONDITIONS.items():
        (place,) = [y for text, y in places.items() if text.startswith(f"top-1% of FFN neurons (40): {label}")]
        row = table.filter(**wanted).row(0, named=True)
        assert segments(axes)[round(place, 6)] == pytest.approx((row["low"], row["high"]))


def test_a_ranking_by_relation_is_drawn_in_sample_with_its_control():
    table = robustness_table(some(12), rankings=("per_relation",))
    table = table.filter(~((pl.col("control") == "none") & pl.col("crossfit")))
    table = table.with_columns(crossfit=False)
    axes = panel(dynamics_plots.robustness(table, "tiny"), "Top-1 head")
    rows = table.filter(metric="hit@10", site="head", size="1")
    assert_curve(axes, "largest mean LPI on the relation, in-sample", rows.filter(control="none"))
    assert_curve(axes, "matched control", rows.filter(control="matched"))
    assert not any("cross-fitted" in line.get_label() for line in axes.lines)


def bars(axes):
    """(x, low, high) of all vertical intervals."""
    lines = [collection for collection in axes.collections if hasattr(collection, "get_segments")]
    ends = [segment for collection in lines for segment in collection.get_segments()]
    return {(round(s[0, 0], 9), round(s[0, 1], 9), round(s[1, 1], 9)) for s in ends}


def test_dose_response_draws_every_dose_of_the_last_step(drawn):
    figure = drawn("dose response")
    assert "step 800" in figure._suptitle.get_text()
    table = robustness_table(some(12)).filter(step=800, site="ffn_neuron")
    for line, metric in ((0, "hit@10"), (1, "log_prob")):
        number, carried = panels(figure)[2 * line : 2 * line + 2]
        for label, wanted in CONDITIONS.items():
            rows = table.filter(metric=metric, **wanted).sort("units")
            assert len(rows) == 4
            x, y, _ = lines(number, label)
            assert x == pytest.approx([0.1, 0.3, 1, 3], rel=0.1)
            assert y == pytest.approx(rows["value"].to_numpy())
            x, y, _ = lines(carried, label)
            assert x == pytest.approx(rows["removed"].to_numpy())
            ends = rows.select(*(pl.col(c).round(9) for c in ("removed", "low", "high"))).rows()
            assert set(ends) <= bars(carried)


def test_without_hit10_the_dose_response_is_in_nats(drawn):
    figure = drawn("dose response, unavailable")
    assert [axes.get_ylabel() for axes in panels(figure)] == ["drop of log p(target) (nats)", ""]
    assert "not available" in said(figure)
    with pytest.raises(drawing.PlotError, match="no neurons were ablated"):
        dynamics_plots.dose_response(robustness_table([800]).filter(site="head"), "tiny")


def test_faithfulness_draws_neurons_and_correlations(drawn):
    figure, kinds = drawn("faithfulness, kinds"), ("routed", "shared")
    scatter, correlation, course = panels(figure)
    neurons, scores = faithfulness_table(kinds), scores_table(some(12), kinds)
    for kind in kinds:
        rows = neurons.filter(kind=kind)
        x, y, _ = lines(scatter, kind)
        assert (x.tolist(), y.tolist()) == (rows["lpi"].to_list(), rows["effect"].to_list())
    assert scatter.get_xlim() == scatter.get_ylim()
    assert max(neurons["lpi"].abs().max(), neurons["effect"].abs().max()) < scatter.get_xlim()[1]
    last = scores.filter(step=800)
    assert len(correlation.get_yticks()) == 12
    random = last.filter(kind="all", score="random")
    (stripe,) = correlation.patches
    assert (stripe.get_x(), stripe.get_x() + stripe.get_width()) == pytest.approx((random["low"][0], random["high"][0]))
    wanted = last.filter(kind="routed", score="gradient").row(0, named=True)
    places = dict(
        zip([tick.get_text() for tick in correlation.get_yticklabels()], correlation.get_yticks(), strict=True)
    )
    place = round(places["gradient × activation, routed"], 6)
    assert segments(correlation)[place] == pytest.approx((wanted["low"], wanted["high"]))
    for label, score in (("LPI", "lpi"), ("gradient", "gradient"), ("|coef", "magnitude"), ("random", "random")):
        assert_curve(course, label, scores.filter(kind="all", score=score))


def test_one_kind_of_neuron_is_coloured_by_layer(drawn):
    scatter = panels(drawn("faithfulness"))[0]
    (cloud,) = scatter.collections
    table = faithfulness_table()
    assert cloud.get_offsets().tolist() == table.select("lpi", "effect").to_numpy().tolist()
    assert cloud.get_array().tolist() == table["layer"].to_list()
    assert any(axes.get_ylabel() == "layer" for axes in drawn("faithfulness").axes)


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
    looks = {
        (to_hex(line.get_color()), line.get_linestyle()) for line in axes.lines if "random" not in line.get_label()
    }
    assert len(looks) == 10


def test_sparsity_holds_the_series_against_each_other(drawn):
    figure = drawn("sparsity, 12")
    moe, dense = neuron_table(STEPS[12]), neuron_table(STEPS[12], moe=False, seed=1, masked=True)
    populations = (("all", "all"), ("all", "masked"), ("prompt", "prompt"), ("matched", "all"))
    for row, (of_moe, of_dense) in enumerate(populations):
        last = "effective_share" if row == 2 else "positive_share"
        middle = "positive_share" if row == 2 else "gain_share"
        for axes, metric in zip(panels(figure)[3 * row :][:3], ("jaccard", middle, last), strict=True):
            assert_curve(axes, "tiny-olmoe (MoE)", of(moe, "ffn", metric, of_moe))
            assert_curve(axes, "tiny-olmo (dense)", of(dense, "ffn", metric, of_dense))
    first = panels(figure)[0]
    assert_curve(first, "J expected given layer × expert", of(moe, "ffn", "jaccard_given_expert"))
    assert_curve(first, "J expected given the layer", of(dense, "ffn", "jaccard_given_layer"))


def test_sparsity_says_differences_and_verdicts(drawn):
    words = said(drawn("sparsity, 12"))
    assert words.count("Δ +0.12 [0.04, 0.20]: exceeds") == 6
    assert words.count("Δ over N1 +0.12 [0.04, 0.20]: exceeds") == 1
    assert words.count("Δ −0.018 [−0.043, 0.011]: not above") == 5  # of N3, gain and importance are one
    for claim in ("Stability", "Gain", "Importance"):
        assert f"{claim}: not beyond sparsity. The mixture of experts exceeds the dense model under the same" in words
    table, verdict = sparsity_tables()
    unknown = [pl.lit(None, dtype=pl.Float64).alias(f"difference_{end}") for end in ("value", "low", "high")]
    neurons = {"tiny-olmoe": neuron_table(STEPS[12], groups=False)}
    neurons["tiny-olmo"] = neuron_table(STEPS[12], moe=False, groups=False)
    table = table.with_columns(*unknown, exceeds=pl.lit(None, dtype=pl.Boolean))
    verdict = verdict.with_columns(beyond_sparsity=pl.lit(None, dtype=pl.Boolean))
    figure = laid_out(dynamics_plots.sparsity(table, verdict, neurons))
    assert said(figure).count("Δ") == 1
    assert "Stability: undecided." in said(figure)
    assert len(panels(figure)) == 9  # without masked sums no N2
    assert not any(axes.collections for axes in panels(figure))


NEED_TWO = (stability, concentration, survival, consolidation, comparison, sparsity)


@pytest.mark.parametrize("draw", NEED_TWO, ids=lambda draw: draw.__name__)
def test_one_checkpoint_is_refused_in_one_line(draw):
    with pytest.raises(drawing.PlotError, match="two checkpoints") as error:
        draw(1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "draw", [stability, concentration, consolidation, robustness, faithfulness, comparison, sparsity]
)
def test_unknown_tokens_are_refused_with_the_cure(draw):
    with pytest.raises(drawing.PlotError, match="axis: step"):
        draw(12, axis="tokens", tokens=False)
    with pytest.raises(drawing.PlotError, match="day: no such axis"):
        draw(12, axis="day")


def test_courses_run_over_what_is_asked(drawn):
    axes = panel(drawn("stability, tokens"), "FFN")
    assert lines(axes, "J with")[0].tolist() == [tokens_of(step) for step in STEPS[16][1:]]
    assert axes.get_xlabel() == "training tokens (trillions)"
    assert [tick.get_text() for tick in axes.get_xticklabels()][-2:] == ["4", "6"]
    assert axes.get_xscale() == "linear"
    assert panel(drawn("concentration, no groups"), "FFN").get_xlabel() == "training step"
    assert "log scale" in panel(drawn("stability, 16"), "FFN").get_xlabel()


@pytest.mark.parametrize("name", ["stability, no groups", "concentration, no groups", "consolidation, no groups"])
def test_without_intervals_there_is_no_band(drawn, name):
    assert not any(len(c.get_facecolor()) for axes in panels(drawn(name)) for c in axes.collections)
    assert "halves" not in said(drawn(name))


def test_values_that_are_nowhere_known_leave_a_frame():
    """Profiles of a single layer have no correlation."""
    nothing = [pl.lit(None, dtype=pl.Float64).alias(end) for end in ("value", "low", "high")]
    similarity, layers = (made.with_columns(nothing) for made in (similarity_table(STEPS[12]), layer_table(STEPS[12])))
    figure = laid_out(dynamics_plots.consolidation(similarity, layers, "one-layer"))
    assert "FFN: consistency not available" in said(figure)


def test_a_share_is_shown_up_to_1_whatever_its_interval(drawn):
    table = neuron_table(STEPS[12]).with_columns(high=pl.col("value") + 1.5, low=pl.col("value") - 1.5)
    for figure in (dynamics_plots.stability(table, "tiny"), dynamics_plots.concentration(table, "tiny")):
        for axes in panels(figure):
            assert -0.05 < axes.get_ylim()[0] < 0
            assert axes.get_ylim()[1] < 1.05


def test_a_value_that_stands_alone_is_a_point_with_a_bar(drawn):
    axes, table = panel(drawn("stability, 2"), "FFN"), neuron_table(STEPS[2])
    for metric in ("jaccard", "cross_half", "jaccard_given_layer"):
        row = of(table, "ffn", metric).row(0, named=True)
        assert (800, round(row["low"], 9), round(row["high"], 9)) in bars(axes)
        assert any(line.get_marker() != "None" and row["value"] in line.get_ydata() for line in axes.lines)


LIBRARY = {**os.environ, "PYTHONPATH": str(Path(drawing.__file__).parents[1])}
SAVE = """
import sys, polars as pl
from moescope import drawing, dynamics_plots
figure = dynamics_plots.robustness(pl.read_parquet(sys.argv[1]), "tiny")
drawing.save(figure, sys.argv[2] + ".pdf", sys.argv[2] + ".png")
"""


def test_equal_tables_give_equal_bytes(tmp_path):
    """With another hash seed, and after someone changed matplotlib's settings."""
    table = robustness_table(some(12), unavailable=(0,))
    table.write_parquet(tmp_path / "table.parquet")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "pdf.compression": 0, "savefig.dpi": 30}):
        drawing.save(dynamics_plots.robustness(table, "tiny"), tmp_path / "here.pdf", tmp_path / "here.png")
    command = [sys.executable, "-c", SAVE, str(tmp_path / "table.parquet"), str(tmp_path / "there")]
    subprocess.run(command, env={**LIBRARY, "PYTHONHASHSEED": "7"}, check=True)
    for ending in ("pdf", "png"):
        assert (tmp_path / f"here.{ending}").read_bytes() == (tmp_path / f"there.{ending}").read_bytes()


CAPTIONS = Path(drawing.__file__).parents[2] / "report"
WARNINGS = {
    "stability": ("jackknife", "pointwise", "smaller a choice"),
    "concentration": ("Cross-fitted", "mechanical reason", "pointwise"),
    "survival": ("above the diagonal", "0.005"),
    "consolidation": ("complementary by accounting", "pointwise"),
    "robustness": ("optimistic", "below 0.1", "named below the figure", "Matched"),
    "dose_response": ("optimistic", "share of the squared norm"),
    "faithfulness": ("stratified", "zeroed at the last position only"),
    "comparison": ("data", "number of steps", "complementary by accounting", "pointwise"),
    "sparsity": ("trained without them", "data mix", "N2, N3 and N4", "pointwise"),
}


@pytest.mark.parametrize(("figure", "warnings"), WARNINGS.items(), ids=WARNINGS.keys())
def test_every_caption_holds_its_caveats(figure, warnings):
    text = " ".join((CAPTIONS / f"{figure}.rst").read_text(encoding="utf-8").split())
    assert "**Caveats.**" in text
    assert "One training run per architecture: intervals cover prompts, not seeds" in text
    assert "tiny" in text
    assert "{{" not in text  # the same file is a caption of Snakemake's own report
    assert not [warning for warning in warnings if warning.lower() not in text.lower()]
    assert callable(getattr(dynamics_plots, figure))
