"""Synthetic tables of study dynamics, of every length and with every gap, and what holds of all their figures."""

import functools
import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from moescope import drawing, tables
from tests.reading import laid_out

STEPS = {
    1: [800],
    2: [0, 800],
    12: [0, 8, 13, 20, 32, 50, 80, 127, 201, 318, 505, 800],
    16: [*range(10_000, 80_000, 10_000), *range(100_000, 700_000, 100_000), 800_000, 1_000_000, 1_220_000],
    244: [5_000 * i for i in range(1, 245)],
}
LONG = "a-series-with-a-name-of-some-length.that-nobody-foresaw-in-the-design"
READINGS = ("gain_share", "gain_share_layer", "gain_share_by_importance", "gain_share_by_importance_layer")
PAIRED = ("jaccard", "survival", "cross", "reliability", "excess", *READINGS)
DOSES = ("0.1%", "0.3%", "1%", "3%")


def made(rows, name):
    """Rows (dicts) as a checked table; columns that are left out are null."""
    columns = tables.SCHEMAS[name].columns
    assert set().union(*rows) <= set(columns)
    return tables.check(pl.DataFrame(rows, schema=dict(columns)), name)


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

    def add(component, population, metric, start, end, noise=0.01, resolution=None):
        over = steps[1:] if metric.startswith(PAIRED) else steps
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
                    "resolution": resolution,
                    **interval(max(value, 0.001), random, groups),
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
    for population, size in [("matched", 5.12 if moe else 41.3)] + ([("masked", 42)] if masked else []):
        for metric, level in (("jaccard", 0.15), ("positive_share", 0.2), ("gain_share", 0.3)):
            add("ffn", population, metric, level, level + 0.1, resolution=0.2 if metric == "jaccard" else None)
        add("ffn", population, "survival", 0.3, 0.4, resolution=1 / size)
    return made(rows, "neuron_dynamics")


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
            difference = {"pairs": 11, "difference_value": 0.121, "difference_low": 0.043, "difference_high": 0.198}
            if test in ("N3", "N4"):
                difference = {
                    "pairs": 11,
                    "difference_value": -0.018,
                    "difference_low": -0.043,
                    "difference_high": 0.011,
                }
            rows.append({**row, **difference})
    for claim in ("stability", "gain", "importance"):
        because = "The mixture of experts exceeds the dense model under the same routing (N2) and does not exceed the "
        because += "dense model among a prompt's active neurons (N3) or the dense model at the matched fraction (N4)."
        verdicts.append({"moe": moe, "dense": dense, "claim": claim, "beyond_sparsity": False, "because": because})
    return made(rows, "sparsity"), made(verdicts, "verdict")


def some(steps):
    """Four of the steps, as ablation takes them."""
    steps = STEPS[steps]
    return [steps[i] for i in sorted({0, len(steps) // 3, 2 * len(steps) // 3, len(steps) - 1})]


COMPONENTS = {"ffn": "FFN", "attn": "Attention"}


def of(table, component, metric, population="all"):
    return table.filter(component=component, metric=metric, population=population)


def drawn_once(figures):
    """A fixture of a module: each of its figures (name -> function, steps, options) drawn and laid out once."""

    @pytest.fixture(scope="module")
    def drawn():
        @functools.cache
        def get(name):
            draw, steps, options = figures[name]
            return laid_out(draw(steps, **options))

        return get

    return drawn


def assert_needs_two(draw):
    """One checkpoint is refused in one line."""
    with pytest.raises(drawing.PlotError, match="two checkpoints") as error:
        draw(1)
    assert "\n" not in str(error.value)


def assert_axis_is_checked(draw):
    """Unknown tokens, and an unknown axis, are refused with the cure."""
    with pytest.raises(drawing.PlotError, match="axis: step"):
        draw(2, axis="tokens", tokens=False)
    with pytest.raises(drawing.PlotError, match="day: no such axis"):
        draw(2, axis="day")


def assert_caption_warns(figure, warnings):
    """The caption of a figure holds what every one must say, and these warnings."""
    caption = Path(drawing.__file__).parents[2] / "report" / f"{figure}.rst"
    text = " ".join(caption.read_text(encoding="utf-8").split())
    assert "**Caveats.**" in text
    assert "One training run per architecture: intervals cover prompts, not seeds" in text
    assert "tiny" in text
    assert "{{" not in text  # the same file is a caption of Snakemake's own report
    assert not [warning for warning in warnings if warning.lower() not in text.lower()]
