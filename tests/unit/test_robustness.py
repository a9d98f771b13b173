"""Drops of ablated models, against explicit resampling and hand-made tables; rank correlations against scipy."""

import math
import time

import numpy as np
import polars as pl
import pytest
from scipy.stats import linregress, spearmanr, t

from moescope import tables
from moescope.robustness import RobustnessError, degenerate, robustness, score_faithfulness, units
from moescope.sample import Checkpoint, SampleError
from moescope.statistics import SubjectBootstrap

#: relation, category, subject, group (0-4 are fold 0). s0 and s2 occur in two relations, s5 alone makes a category.
FACTS = [
    ("a", "x", "s0", 0), ("a", "x", "s1", 7), ("a", "x", "s2", 3), ("a", "x", "s3", 9),
    ("b", "x", "s0", 0), ("b", "x", "s2", 3), ("b", "x", "s4", 8),
    ("c", "y", "s5", 2),
]  # fmt: skip
CLEAN = [1, 2, 4, 20, 5, 30, 1, 2]
LOG = ("site", "size", "ranking", "control", "fold", "seed")


def prompts(facts=FACTS):
    rows = [(f"{f[0]}/{i}", *f[:3], "o", "{} is", f"{f[2]} is", f[3]) for i, f in enumerate(facts)]
    return tables.check(pl.DataFrame(rows, schema=list(tables.SCHEMAS["prompts"].columns), orient="row"), "prompts")


def run(
    ranks, site="head", size="1", ranking="signed", control="none", fold=None, seed=None, removed=None, facts=FACTS
):
    """Rows of one run; with a fold only its prompts. log_prob is -log(rank)."""
    inside = [i for i, fact in enumerate(facts) if fold is None or fact[3] // 5 == fold]
    labels = dict(zip(LOG, (site, size, ranking, control, fold, seed), strict=True))
    return [
        {
            **labels,
            "prompt_id": f"{facts[i][0]}/{i}",
            "rank": ranks[i],
            "log_prob": -math.log(ranks[i]),
            "removed": removed,
        }
        for i in inside
    ]


def clean(ranks=CLEAN, facts=FACTS):
    return run(ranks, site="none", size="0", ranking=None, facts=facts)


def ablations(*runs):
    return tables.check(pl.DataFrame([row for one in runs for row in one], infer_schema_length=None), "ablations")


def one_step(*runs, step=10, heads=100, neurons=1000, facts=FACTS):
    return robustness([Checkpoint(step, 5, ablations(*runs))], prompts(facts), heads, neurons)


def cell(table, **keys):
    """The one row with these keys; unnamed ones are those of the micro average of HIT@10 over all prompts."""
    keys = {"scope": "all", "average": "micro", "metric": "hit@10", **keys}
    rows = table.filter(*(pl.col(key).eq_missing(pl.lit(value)) for key, value in keys.items()))
    assert len(rows) == 1, rows
    return rows.row(0, named=True)


def test_relative_drops_by_hand():
    """Clean: hits of a are 3/4, of b 2/3, of c 1. Ablated: 1/4, 2/3, 0."""
    ablated = [1, 20, 40, 20, 5, 30, 1, 11]
    table, _ = one_step(clean(), run(ablated))
    found = cell(table)
    assert (found["clean"], found["ablated"]) == (pytest.approx(6 / 8), pytest.approx(3 / 8))
    assert found["value"] == pytest.approx(1 / 2)  # not the mean of ratios, (2/3 + 0 + 1) / 3
    assert cell(table, average="macro")["value"] == pytest.approx(1 - (1 / 4 + 2 / 3 + 0) / (3 / 4 + 2 / 3 + 1))
    assert cell(table, scope="category", name="x")["value"] == pytest.approx(1 - 3 / 5)
    assert cell(table, scope="category", name="x", average="macro")["value"] == pytest.approx(1 - 11 / 17)
    assert cell(table, scope="relation", name="b")["value"] == 0
    mrr = 1 - sum(1 / r for r in ablated) / sum(1 / r for r in CLEAN)
    assert cell(table, metric="mrr")["value"] == pytest.approx(mrr)
    nats = np.mean([math.log(b / a) for a, b in zip(CLEAN, ablated, strict=True)])
    assert cell(table, metric="log_prob")["value"] == pytest.approx(nats, abs=1e-6)
    assert (found["step"], found["tokens"], found["prompts"], found["seeds"], found["p"]) == (10, 5, 8, 0, None)
    # (all and two categories) x two averages + three relations, three metrics
    assert len(table) == (3 * 2 + 3) * 3


def drawn_means(values, facts=FACTS, average="micro"):
    """Row 0 the sample, then every draw: the prompts copied as often as their subject is drawn."""
    bootstrap = SubjectBootstrap.draw({fact[2] for fact in facts})
    weight = bootstrap.counts[:, [bootstrap.subjects.index(fact[2]) for fact in facts]]
    if average == "micro":
        return weight @ values / weight.sum(axis=1)
    with np.errstate(invalid="ignore"):
        inside = [np.array([fact[0] == relation for fact in facts]) for relation in "abc"]
        return np.nanmean([weight[:, i] @ values[i] / weight[:, i].sum(axis=1) for i in inside], axis=0)


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_intervals_pair_the_clean_and_the_ablated_run(average):
    ablated = [1, 20, 40, 20, 5, 30, 1, 11]
    table, _ = one_step(clean(), run(ablated))
    for metric, of in (("hit@10", lambda r: np.array(r) <= 10), ("mrr", lambda r: 1 / np.array(r))):
        before, after = (drawn_means(of(ranks).astype(float), average=average) for ranks in (CLEAN, ablated))
        with np.errstate(invalid="ignore"):
            drop = (before - after) / before
        found = cell(table, average=average, metric=metric)
        assert found["value"] == pytest.approx(drop[0])
        assert [found["low"], found["high"]] == pytest.approx(np.nanpercentile(drop[1:], [2.5, 97.5]))
    same, _ = one_step(clean(), run(CLEAN))
    assert (same["value"].drop_nulls() == 0).all()
    assert (same["high"].drop_nulls() == 0).all()  # an unpaired interval would have a width
    assert cell(same, scope="relation", name="c")["low"] is None  # one subject


def test_folds_are_put_together_and_kept_from_the_in_sample_row():
    first, second, inside = [50] * 8, [1] * 8, [3] * 8
    table, _ = one_step(clean(), run(first, fold=0), run(second, fold=1), run(inside))
    fold_1 = [fact[3] >= 5 for fact in FACTS]
    crossfit = cell(table, crossfit=True)
    assert crossfit["ablated"] == pytest.approx(np.mean(fold_1))
    assert (crossfit["prompts"], crossfit["clean"]) == (8, pytest.approx(6 / 8))
    assert cell(table, crossfit=False)["ablated"] == 1
    assert set(table.select("ranking", "control", "crossfit").unique().iter_rows()) == {
        ("signed", "none", True), ("signed", "none", False),
    }  # fmt: skip


def test_no_relative_drop_where_the_clean_model_knows_nothing():
    """HIT@10 of a is 0, of everything 1/8 (enough); the log-probability has a value everywhere."""
    unknowing = [30, 30, 30, 30, 30, 30, 1, 30]
    table, summary = one_step(clean(unknowing), run([40] * 8))
    for metric in ("hit@10", "mrr"):
        gone = cell(table, scope="relation", name="a", metric=metric)
        assert (gone["value"], gone["low"], gone["high"], gone["p"]) == (None,) * 4
        assert gone["clean"] is not None
        assert cell(table, metric=metric)["value"] is not None
        counted = cell(summary, scope="relation", name="a", metric=metric, statistic="mean")
        assert (counted["value"], counted["checkpoints"], counted["unavailable"]) == (None, 0, 1)
    assert cell(table, scope="relation", name="a", metric="log_prob")["value"] == pytest.approx(math.log(40 / 30))
    facts = [("a", "x", f"s{i}", 0) for i in range(10)]
    at_the_edge = [1] + [99] * 9
    table, _ = one_step(clean(at_the_edge, facts), run([99] * 10, facts=facts), facts=facts)
    assert cell(table)["value"] == 1
    # it is HIT@10 that decides: 0.1 with an MRR of 0.02; and none of 10 hits with an MRR of 0.09
    for ranks, known in (([10] + [99] * 9, True), ([11] * 10, False)):
        table, _ = one_step(clean(ranks, facts), run([999] * 10, facts=facts), facts=facts)
        for metric in ("hit@10", "mrr"):
            assert (cell(table, metric=metric)["value"] is not None) is known


def test_controls_are_averaged_over_seeds():
    seeds = [[1] * 8, [50] * 8, [50] * 4 + [1] * 4]
    controls = [run(r, ranking=None, control="random", seed=s, removed=r[0] / 100) for s, r in enumerate(seeds)]
    table, _ = one_step(clean(), run([50] * 8), *controls)
    found = cell(table, control="random")
    assert (found["seeds"], found["ranking"], found["crossfit"]) == (3, None, False)
    assert found["ablated"] == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert found["removed"] == pytest.approx((0.01 + 0.5 + 0.5) / 3)
    mean = drawn_means(np.mean([np.array(r) <= 10 for r in seeds], axis=0))
    before = drawn_means((np.array(CLEAN) <= 10).astype(float))
    with np.errstate(invalid="ignore", divide="ignore"):
        drop = 1 - mean / before
    low, high = np.nanpercentile(drop[1:][before[1:] > 0], [2.5, 97.5])
    each = [1 - sum(rank <= 10 for rank in ranks) / 6 for ranks in seeds]  # of 6 clean hits
    assert found["spread"] == pytest.approx(math.sqrt(sum((one - np.mean(each)) ** 2 for one in each) / 2))
    reach = t.ppf(0.975, 2) * found["spread"] / math.sqrt(3)
    assert found["low"] == pytest.approx(found["value"] - math.sqrt((found["value"] - low) ** 2 + reach**2))
    assert found["high"] == pytest.approx(found["value"] + math.sqrt((high - found["value"]) ** 2 + reach**2))
    assert cell(table, control="none")["spread"] is None
    unseen = [run(r, ranking=None, control="random", seed=s) for s, r in enumerate(seeds)]
    table, _ = one_step(clean([30] * 8), *unseen)
    assert (cell(table)["spread"], cell(table, metric="mrr")["spread"]) == (None, None)
    assert cell(table, metric="log_prob")["spread"] is not None


def test_the_spread_is_that_of_each_scope_and_average():
    """Against a loop over relations; three seeds, matched, each put together from its two folds."""
    seeds = [[1, 20, 40, 20, 5, 30, 1, 11], [50] * 8, [1, 2, 4, 20, 50, 30, 1, 2]]
    controls = [run(ranks, control="matched", fold=f, seed=s) for s, ranks in enumerate(seeds) for f in (0, 1)]
    table, _ = one_step(clean(), *[run(CLEAN, fold=f) for f in (0, 1)], *controls)
    for metric, of in (("hit@10", lambda rank: rank <= 10), ("mrr", lambda rank: 1 / rank)):
        for scope, name, average, relations in (
            ("all", None, "micro", ["abc"]), ("all", None, "macro", "abc"), ("category", "x", "macro", "ab"),
            ("relation", "b", "micro", "b"),
        ):  # fmt: skip
            before, *after = (
                np.mean([np.mean([of(ranks[i]) for i in range(8) if FACTS[i][0] in one]) for one in relations])
                for ranks in (CLEAN, *seeds)
            )
            drops = [(before - one) / before for one in after]
            found = cell(table, control="matched", scope=scope, name=name, average=average, metric=metric)
            assert found["value"] == pytest.approx(np.mean(drops))
            assert found["spread"] == pytest.approx(np.std(drops, ddof=1))


def test_one_draw_of_a_control_has_no_interval():
    table, summary = one_step(clean(), run(CLEAN), run([50] * 8, ranking=None, control="random", seed=0))
    for found in (cell(table, control="random"), cell(summary, control="random", statistic="mean")):
        assert (found["value"], found["low"], found["high"], found["spread"]) == (1, None, None, None)
    assert cell(table, control="none")["high"] == 0


def test_the_spread_over_steps_is_that_of_the_means_and_slopes_of_the_seeds():
    """Two seeds that differ by as much at all steps: their draws do not average out over steps."""
    facts = [("a", "x", f"s{i}", 0) for i in range(8)]
    lost = {10: (2, 6), 100: (1, 7), 1000: (1, 5)}
    frames = [
        Checkpoint(step, None, ablations(clean([1] * 8, facts), *(
            run([99] * n + [1] * (8 - n), ranking=None, control="random", seed=s, facts=facts)
            for s, n in enumerate(numbers)
        )))
        for step, numbers in lost.items()
    ]  # fmt: skip
    _, summary = robustness(frames, prompts(facts), 100, 100)
    counts = SubjectBootstrap.draw({fact[2] for fact in facts}).counts[1:]
    drawn = np.array([sum(counts[:, :n].sum(axis=1) for n in numbers) / 16 for numbers in lost.values()])
    for statistic, of in (("mean", lambda y: np.mean(y)), ("slope", lambda y: linregress([1, 2, 3], y).slope)):
        each = [of([numbers[s] / 8 for numbers in lost.values()]) for s in (0, 1)]
        found = cell(summary, statistic=statistic)
        assert found["value"] == pytest.approx(np.mean(each))
        assert found["spread"] == pytest.approx(np.std(each, ddof=1))
        low, high = np.percentile([of(draw) for draw in drawn.T], [2.5, 97.5])
        reach = t.ppf(0.975, 1) * found["spread"] / math.sqrt(2)
        assert found["low"] == pytest.approx(found["value"] - math.hypot(found["value"] - low, reach))
        assert found["high"] == pytest.approx(found["value"] + math.hypot(high - found["value"], reach))
    more = run([1] * 8, ranking=None, control="random", seed=2, facts=facts)
    other = Checkpoint(5000, None, pl.concat([frames[0].frame, ablations(more)]))
    with pytest.raises(RobustnessError, match=r"step 5000: head 1 \(control random\) has 3 seeds, not 2"):
        robustness([*frames, other], prompts(facts), 100, 100)


def test_steps_without_a_control_are_counted():
    """A matched control that two of four steps do not have: one was not drawn, of one there is a fold alone."""
    facts = [("a", "x", f"s{i}", i) for i in range(10)]
    runs = [run([99] * 10, fold=f, facts=facts) for f in (0, 1)]
    runs += [run([1] * 10, control="matched", fold=f, seed=s, facts=facts) for s in (0, 1) for f in (0, 1)]
    frames = {0: runs, 10: runs[:2], 100: [*runs[:3], runs[4]], 1000: runs}
    checkpoints = [Checkpoint(s, None, ablations(clean([1] * 10, facts), *found)) for s, found in frames.items()]
    for order in (checkpoints, checkpoints[1:] + checkpoints[:1]):  # missing at the first step, too
        _, summary = robustness(order, prompts(facts), 100, 100)
        counted = {
            (control, statistic): tuple(cell(summary, control=control, statistic=statistic).values())[-3:-1]
            for control in ("none", "matched")
            for statistic in ("mean", "slope")
        }
        assert counted == {
            ("none", "mean"): (4, 0), ("none", "slope"): (3, 0),
            ("matched", "mean"): (2, 2), ("matched", "slope"): (1, 2),
        }  # fmt: skip


def test_removed_share_is_averaged_like_the_metric():
    rows = [{**row, "removed": i / 10} for i, row in enumerate(run(CLEAN, site="ffn_neuron", size="1%"))]
    table, _ = one_step(clean(), rows, run(CLEAN))
    assert cell(table, site="ffn_neuron")["removed"] == pytest.approx(0.35)
    assert cell(table, site="ffn_neuron", average="macro")["removed"] == pytest.approx((0.15 + 0.5 + 0.7) / 3)
    assert cell(table, site="ffn_neuron", scope="relation", name="b")["removed"] == pytest.approx(0.5)
    assert cell(table, site="head")["removed"] is None


@pytest.mark.parametrize(("seeds", "p"), [(18, None), (19, 4 / 20), (39, 4 / 40)])
def test_p_counts_the_controls_that_do_as_much(seeds, p):
    """The cross-fitted selection loses 4 of 6 hits, as do seeds 0 and 1; seed 2 loses all, the others none."""
    lost = [50, 50, 50, 20, 50, 30, 1, 2]
    ranks = {0: lost, 1: lost, 2: [50] * 8}
    matched = [
        run(ranks.get(s, CLEAN), control="matched", fold=f, seed=s, removed=None) for s in range(seeds) for f in (0, 1)
    ]
    random = [run(ranks.get(s, CLEAN), ranking=None, control="random", seed=s) for s in range(seeds)]
    selection = [run(lost, fold=f) for f in (0, 1)]
    table, _ = one_step(clean(), *selection, run(CLEAN), *matched, *random)
    for control in ("matched", "random"):
        assert cell(table, control=control)["p"] == (None if p is None else pytest.approx(p))
        assert cell(table, control=control)["seeds"] == seeds
    assert table.filter(pl.col("control") == "none")["p"].is_null().all()
    # without a cross-fitted selection, random sets are held against the in-sample one, which nothing falls short of
    table, _ = one_step(clean(), run(CLEAN), *random)
    assert cell(table, control="random")["p"] == (None if p is None else 1)


def test_rankings_stand_apart_and_random_serves_the_default():
    abs_, signed = [50] * 8, CLEAN
    random = [run([50] * 4 + CLEAN[4:], ranking=None, control="random", seed=s) for s in range(19)]
    table, _ = one_step(clean(), run(abs_, ranking="abs"), run(signed), run([2] * 8, ranking="per_relation"), *random)
    assert cell(table, ranking="abs")["value"] == 1
    assert cell(table, ranking="signed")["value"] == 0
    assert cell(table, control="random")["p"] == 1  # against signed, not abs


@pytest.mark.parametrize(
    ("site", "size", "heads", "neurons", "number", "flag"),
    [
        ("head", "1", 32, 0, 1, False),
        ("head", "10", 32, 0, 10, True),  # a third of all heads
        ("head", "1%", 32, 0, 1, True),  # the top-1 head again
        ("head", "10", 256, 0, 10, False),  # OLMoE: 3.9%
        ("head", "1%", 256, 0, 3, False),
        ("head", "1%", 1000, 0, 10, True),
        ("head", "1%", 1024, 0, 11, False),  # OLMo
        ("head", "10", 100, 0, 10, False),  # 10%, not more
        ("head", "1", 9, 0, 1, True),
        ("ffn_neuron", "0.1%", 32, 4096, 5, False),
        ("ffn_neuron", "1%", 32, 700, 7, False),
        ("ffn_neuron", "3%", 32, 1_048_576, 31_458, False),
    ],
)
def test_units_and_degenerate_sizes(site, size, heads, neurons, number, flag):
    assert units(site, size, heads, neurons) == number
    assert degenerate(site, size, heads) is flag
    table, summary = one_step(clean(), run(CLEAN, site=site, size=size), heads=heads, neurons=neurons)
    assert table.select("units", "degenerate").unique().rows() == [(number, flag)]
    assert summary["degenerate"].unique().to_list() == [flag]


def course(*steps):
    """Checkpoints at (step, prompts of 8 that the clean model knows, how many of the first it then loses)."""
    facts = [("a", "x", f"s{i}", 0) for i in range(8)]
    frames = []
    for step, known, lost in steps:
        before = [1 if i < known else 99 for i in range(8)]
        after = [99 if i < lost else rank for i, rank in enumerate(before)]
        frames.append(Checkpoint(step, None, ablations(clean(before, facts), run(after, facts=facts))))
    return frames, facts


def test_mean_and_slope_over_checkpoints():
    """Step 0 counts for the mean alone; at step 10 the model knows nothing: not available, counted."""
    steps = [(0, 8, 8), (10, 0, 0), (100, 8, 6), (1000, 8, 4), (10_000, 4, 1)]
    frames, facts = course(*steps)
    _, summary = robustness(iter(frames), prompts(facts), 100, 100)
    mean, slope = (cell(summary, statistic=statistic) for statistic in ("mean", "slope"))
    assert mean["value"] == pytest.approx((1 + 6 / 8 + 4 / 8 + 1 / 4) / 4)
    assert (mean["checkpoints"], mean["unavailable"]) == (4, 1)
    assert slope["value"] == pytest.approx(-0.25)
    assert (slope["checkpoints"], slope["unavailable"]) == (3, 1)
    counts = SubjectBootstrap.draw({fact[2] for fact in facts}).counts[1:]
    drawn = []
    for _, known, lost in (steps[0], *steps[2:]):
        with np.errstate(invalid="ignore"):
            drawn.append(counts[:, :lost].sum(axis=1) / counts[:, :known].sum(axis=1))
    drawn = np.array(drawn)
    assert [mean["low"], mean["high"]] == pytest.approx(np.nanpercentile(drawn.mean(axis=0), [2.5, 97.5]))
    whole = drawn[1:, ~np.isnan(drawn).any(axis=0)]
    slopes = [linregress([2, 3, 4], draw).slope for draw in whole.T]
    assert [slope["low"], slope["high"]] == pytest.approx(np.percentile(slopes, [2.5, 97.5]))
    nats = cell(summary, statistic="slope", metric="log_prob")
    assert (nats["checkpoints"], nats["unavailable"]) == (4, 0)


def test_one_checkpoint_has_no_slope_and_main_none_either():
    frames, facts = course((100, 8, 4))
    _, summary = robustness(frames, prompts(facts), 100, 100)
    assert cell(summary, statistic="mean")["value"] == pytest.approx(0.5)
    assert cell(summary, statistic="slope")["value"] is None
    assert cell(summary, statistic="slope")["checkpoints"] == 1


def test_a_matched_control_of_one_fold_has_no_row():
    table, _ = one_step(clean(), run(CLEAN, fold=0), run(CLEAN, fold=1), run(CLEAN, control="matched", fold=0, seed=0))
    assert set(table["control"]) == {"none"}


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([run(CLEAN)], "step 10: ablations.parquet has no clean run"),
        ([clean(), run(CLEAN, fold=0)], r"head 1 \(control none\) tests not all prompts"),
        ([clean(), run(CLEAN, ranking=None, control="random", seed=0)[1:]], "random.* not all prompts"),
        ([clean()[1:], run(CLEAN)], "a prompt that the clean run does not have"),
        (
            [clean(), run(CLEAN, fold=0), [{**row, "fold": 1} for row in run(CLEAN)]],
            "a prompt twice",
        ),
    ],
)
def test_incomplete_tables_are_named(runs, message):
    with pytest.raises(RobustnessError, match=message):
        one_step(*runs)


def test_a_prompt_that_the_prompt_table_lacks_is_named():
    with pytest.raises(SampleError, match=r"c/7 is not in prompts\.parquet"):
        one_step(clean(), run(CLEAN), facts=FACTS[:-1])


# Faithfulness of the score -------------------------------------------------------------------------------------------


def faithfulness(prompt_ids, neurons=40, prompts_of=None, seed=0, noise=0.5):
    """Sampled neurons; every third is an expert's, active in few prompts; LPI follows the effect."""
    random = np.random.default_rng(seed)
    rows = []
    for n in range(neurons):
        routed = n % 3 == 0
        active = random.permutation(len(prompt_ids))[: 3 if routed else len(prompt_ids)]
        size = random.normal()
        for p in active if prompts_of is None else prompts_of(n):
            effect = size + noise * random.normal()
            lpi, gradient = effect + noise * random.normal(), -effect
            ids = (n // 10, "routed" if routed else "shared", n % 2 if routed else None, n)
            rows.append((*ids, prompt_ids[p], effect, lpi, gradient, abs(random.normal())))
    schema = tables.SCHEMAS["faithfulness_prompts"].columns
    return tables.check(pl.DataFrame(rows, schema=dict(schema), orient="row"), "faithfulness_prompts")


MANY = [("a", "x", f"s{i % 12}", 0) for i in range(20)]


def spearman_of(frame, keep=None):
    means = frame.group_by("layer", "kind", "expert", "neuron").agg(
        pl.col("effect", "lpi", "gradient", "magnitude").mean()
    )
    means = means if keep is None else means.filter(pl.col("kind") == keep)
    return {score: spearmanr(means["effect"], means[score])[0] for score in ("lpi", "gradient", "magnitude")}


def test_rank_correlation_equals_scipy():
    table = prompts(MANY)
    frame = faithfulness([f"a/{i}" for i in range(20)])
    found = score_faithfulness([Checkpoint(5, None, frame)], table)
    assert set(found["kind"]) == {"all", "routed", "shared"}
    for kind in ("all", "routed", "shared"):
        for score, expected in spearman_of(frame, None if kind == "all" else kind).items():
            row = found.filter(kind=kind, score=score).row(0, named=True)
            assert row["value"] == pytest.approx(expected, abs=1e-6)
            assert row["low"] <= row["value"] <= row["high"]
    assert found.filter(score="gradient")["value"].to_list() == pytest.approx([-1] * 3)
    assert found.filter(kind="routed")["neurons"].unique().to_list() == [14]
    assert found.filter(kind="all", score="lpi")["low"][0] > found.filter(kind="all", score="random")["high"][0]


def test_the_spread_over_draws_equals_resampled_prompts():
    """300 draws in the plainest way: prompts copied, means and correlation from scratch, absent neurons left out."""
    table, frame = prompts(MANY), faithfulness([f"a/{i}" for i in range(20)], noise=2)
    bootstrap = SubjectBootstrap.draw({fact[2] for fact in MANY})
    rhos = []
    for counts in bootstrap.counts[1:301]:
        copies = pl.DataFrame({"subject": bootstrap.subjects, "copies": counts.astype(int)})
        drawn = table.join(copies, on="subject").select("prompt_id", "copies").join(frame, on="prompt_id")
        drawn = drawn.filter(pl.col("copies") > 0)
        keys = ["layer", "kind", "expert", "neuron"]
        means = drawn.group_by(keys).agg(
            (pl.col(one) * pl.col("copies")).sum() / pl.col("copies").sum() for one in ("effect", "lpi")
        )
        rhos.append(spearmanr(means["effect"], means["lpi"])[0])
    found = score_faithfulness([Checkpoint(5, None, frame)], table).filter(kind="all", score="lpi").row(0, named=True)
    reach = 1.96 * np.std(np.arctanh(rhos), ddof=1)
    expected = np.tanh(np.arctanh(found["value"]) + np.array([-reach, reach]))
    assert [found["low"], found["high"]] == pytest.approx(expected, abs=0.02)


def test_the_random_score_shows_the_range_of_chance():
    frame = faithfulness([f"a/{i}" for i in range(20)], neurons=100)
    row = score_faithfulness([Checkpoint(5, None, frame)], prompts(MANY)).filter(kind="all", score="random")
    value, low, high = row.select("value", "low", "high").row(0)
    assert value == pytest.approx(0, abs=0.01)
    assert [low, high] == pytest.approx([-1.96 / np.sqrt(98), 1.96 / np.sqrt(98)], abs=0.04)
    again = score_faithfulness([Checkpoint(5, None, frame)], prompts(MANY), seed=0)
    assert again.equals(score_faithfulness([Checkpoint(5, None, frame.reverse())], prompts(MANY).reverse(), seed=0))


def test_scores_without_spread_and_single_subjects_have_no_number():
    flat = faithfulness([f"a/{i}" for i in range(20)]).with_columns(magnitude=pl.lit(1.0, dtype=pl.Float32))
    found = score_faithfulness([Checkpoint(5, None, flat)], prompts(MANY))
    assert found.filter(score="magnitude").select("value", "low", "high").unique().rows() == [(None, None, None)]
    alone = faithfulness(["a/0"], prompts_of=lambda _: [0])
    found = score_faithfulness([Checkpoint(5, None, alone)], prompts(MANY)).filter(kind="all", score="lpi")
    assert found["value"][0] is not None
    assert found["low"][0] is None


def test_real_sizes_are_quick():
    """400 neurons on 1,000 prompts of 780 subjects, 2,000 draws."""
    facts = [("a", "x", f"s{i % 780}", 0) for i in range(1000)]
    frame = faithfulness([f"a/{i}" for i in range(1000)], neurons=400)
    start = time.process_time()
    score_faithfulness([Checkpoint(5, None, frame)], prompts(facts))
    assert time.process_time() - start < 10
