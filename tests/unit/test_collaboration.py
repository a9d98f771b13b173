"""Routing budgets and blocked experts, against explicit resampling, hand-made tables and made-up noise."""

import math
import time

import numpy as np
import polars as pl
import pytest
from scipy.stats import binom, t

from moescope import tables
from moescope.collaboration import CollaborationError, blocking, budgets
from moescope.sample import SampleError
from moescope.statistics import SubjectBootstrap

#: relation, category, subject, group (0-4 are fold 0). s0 and s2 occur in two relations, c has a single subject.
FACTS = [
    ("a", "x", "s0", 0), ("a", "x", "s1", 7), ("a", "x", "s2", 3), ("a", "x", "s3", 9),
    ("b", "x", "s0", 0), ("b", "x", "s2", 3), ("b", "x", "s4", 8),
    ("c", "y", "s5", 2),
]  # fmt: skip
CLEAN = [1, 2, 4, 20, 5, 30, 1, 2]
#: Of 6 clean hits, 3 are left: a keeps 1 of 3, b 2 of 2, c none of 1.
AFTER = [1, 20, 40, 20, 5, 30, 1, 11]
SCHEMA = tables.SCHEMAS["expert_interventions"]


def prompts(facts=FACTS):
    rows = [(f"{f[0]}/{i}", *f[:3], "o", "{} is", f"{f[2]} is", f[3]) for i, f in enumerate(facts)]
    return tables.check(pl.DataFrame(rows, schema=list(tables.SCHEMAS["prompts"].columns), orient="row"), "prompts")


def run(ranks, experiment, facts=FACTS, only=None, **labels):
    """Rows of one run; with a fold only its prompts, with ``only`` those of some relations. log_prob is -log(rank)."""
    fold = labels.get("fold")
    return [
        {
            **dict.fromkeys(SCHEMA.columns),
            "experiment": experiment,
            "control": "none",
            **labels,
            "prompt_id": f"{fact[0]}/{i}",
            "rank": ranks[i],
            "log_prob": -math.log(ranks[i]),
        }
        for i, fact in enumerate(facts)
        if (fold is None or fact[3] // 5 == fold) and (only is None or fact[0] in only)
    ]


def clean(ranks=CLEAN, facts=FACTS):
    return run(ranks, "clean", facts)


def budget(ranks, size=1, shared=True, facts=FACTS):
    return run(ranks, "budget", facts, mode="top_n", weights="family", shared=shared, size=size)


def block(ranks, control="none", crossfit=True, seed=None, facts=FACTS, only=None, semantics="reroute", size=1):
    """Leading experts (or their matched control) in both folds or in-sample, relation by relation; or random ones."""
    labels = {"semantics": semantics, "size": size, "control": control, "seed": seed}
    if control == "random":
        return run(ranks, "blocking", facts, **labels)
    labels["importance"] = "top_neuron_frequency"
    relations = sorted({fact[0] for fact in facts if only is None or fact[0] in only})
    return [
        row
        for relation in relations
        for fold in ((0, 1) if crossfit else (None,))
        for row in run(ranks, "blocking", facts, relation, **labels, relation=relation, fold=fold)
    ]


def interventions(*runs):
    rows = [tuple(row[name] for name in SCHEMA.columns) for one in runs for row in one]
    return tables.of_rows(rows, "expert_interventions")


def cell(table, **keys):
    """The one row with these keys; unnamed ones are those of the micro average of HIT@10 over all prompts."""
    keys = {"scope": "all", "average": "micro", "metric": "hit@10", **keys}
    rows = table.filter(*(pl.col(key).eq_missing(pl.lit(value)) for key, value in keys.items()))
    assert len(rows) == 1, rows
    return rows.row(0, named=True)


def blocked(*runs, facts=FACTS):
    return blocking(10, interventions(*runs), prompts(facts))


def drawn_means(values, facts=FACTS, average="micro"):
    """Row 0 the sample, then every draw: prompts copied as often as their subject is drawn, in a loop over draws."""
    bootstrap = SubjectBootstrap.draw({fact[2] for fact in facts})
    where = [bootstrap.subjects.index(fact[2]) for fact in facts]
    means = []
    for counts in bootstrap.counts:
        copies = {}
        for i, fact in enumerate(facts):
            copies.setdefault(fact[0] if average == "macro" else "", []).extend([values[i]] * int(counts[where[i]]))
        each = [np.mean(one) for one in copies.values() if one]
        means.append(np.mean(each) if each else np.nan)
    return np.array(means)


def hit(ranks):
    return (np.array(ranks) <= 10).astype(float)


def mrr(ranks):
    return 1 / np.array(ranks)


def drawn_drop(after, of=hit, average="micro"):
    before, after = drawn_means(of(CLEAN), average=average), drawn_means(np.asarray(after), average=average)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(before > 0, (before - after) / before, np.nan)


def ends(draws, reach=0.0):
    low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
    return [draws[0] - math.hypot(draws[0] - low, reach), draws[0] + math.hypot(high - draws[0], reach)]


# Budgets -------------------------------------------------------------------------------------------------------------


def test_budgets_by_hand():
    """Clean: hits of a are 3/4, of b 2/3, of c 1; under the budget 1/4, 2/3, 0."""
    table = budgets(10, interventions(clean(), budget(AFTER)), prompts())
    found = cell(table)
    assert (found["value"], found["drop_value"], found["prompts"]) == (pytest.approx(3 / 8), pytest.approx(1 / 2), 8)
    macro = cell(table, average="macro")  # neither the micro average nor the mean of the relations' drops, 5/9
    assert macro["value"] == pytest.approx((1 / 4 + 2 / 3) / 3)
    assert macro["drop_value"] == pytest.approx(1 - (1 / 4 + 2 / 3) / (3 / 4 + 2 / 3 + 1))
    a = cell(table, scope="relation", name="a")
    assert (a["value"], a["drop_value"], a["prompts"]) == (pytest.approx(1 / 4), pytest.approx(2 / 3), 4)
    nats = cell(table, metric="log_prob")
    assert nats["value"] == pytest.approx(-np.mean(np.log(AFTER)), abs=1e-6)
    assert nats["drop_value"] == pytest.approx(np.mean(np.log(AFTER)) - np.mean(np.log(CLEAN)), abs=1e-6)
    names = {"step": 10, "mode": "top_n", "size": 1, "weights": "family", "shared": True}
    assert {name: found[name] for name in names} == names
    assert len(table) == (2 + 3) * 3
    assert set(table["scope"]) == {"all", "relation"}


@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize(("metric", "of"), [("hit@10", hit), ("mrr", mrr)])
def test_intervals_of_budgets_pair_the_clean_and_the_changed_run(average, metric, of):
    table = budgets(10, interventions(clean(), budget(CLEAN, size=2), budget(AFTER)), prompts())
    found = cell(table, size=1, average=average, metric=metric)
    assert [found["low"], found["high"]] == pytest.approx(ends(drawn_means(of(AFTER), average=average)))
    assert [found["drop_low"], found["drop_high"]] == pytest.approx(ends(drawn_drop(of(AFTER), of, average)))
    same = cell(table, size=2, average=average, metric=metric)
    assert (same["drop_value"], same["drop_low"], same["drop_high"]) == (0, 0, 0)  # unpaired: an interval with a width
    assert same["low"] < same["high"]


def test_budgets_with_and_without_the_shared_expert_stand_apart():
    runs = [budget([50] * 8, size=0, shared=False), budget(AFTER, size=0), budget(CLEAN, size=1)]
    table = budgets(None, interventions(clean(), *runs), prompts())
    assert [cell(table, size=0, shared=shared)["value"] for shared in (False, True)] == [0, pytest.approx(3 / 8)]
    assert cell(table, size=1)["value"] == pytest.approx(6 / 8)
    assert table["step"].unique().to_list() == [None]


def test_relative_drops_need_a_clean_hit_rate_of_a_tenth():
    table = budgets(10, interventions(clean([30] * 4 + CLEAN[4:]), budget(AFTER)), prompts())
    gone = cell(table, scope="relation", name="a")
    assert (gone["drop_value"], gone["drop_low"], gone["drop_high"]) == (None,) * 3
    assert (gone["value"], gone["low"] is None) == (1 / 4, False)
    assert cell(table, scope="relation", name="a", metric="mrr")["drop_value"] is None
    assert cell(table, scope="relation", name="b", metric="mrr")["drop_value"] is not None
    assert cell(table, scope="relation", name="a", metric="log_prob")["drop_value"] is not None
    table = blocked(clean([30] * 8), block(AFTER), *(block([40 + s] * 8, "random", seed=s) for s in range(19)))
    gone = cell(table, control="random")
    assert [gone[name] for name in ("value", "low", "excess_value", "spread", "p")] == [None] * 5
    assert cell(table, control="random", metric="log_prob")["p"] is not None


def test_a_single_subject_has_no_interval():
    runs = [block(AFTER), *(block(CLEAN, "matched", seed=s) for s in range(3))]
    for table in (budgets(10, interventions(clean(), budget(AFTER)), prompts()), blocked(clean(), *runs)):
        ends_of = table.filter(scope="relation", name="c").select(pl.col("^.*(low|high)$"))
        assert len(ends_of) > 0
        assert ends_of.null_count().row(0) == (len(ends_of),) * len(ends_of.columns)
    assert cell(table, control="matched", scope="relation", name="c")["excess_value"] == 1


# Blocking ------------------------------------------------------------------------------------------------------------


def test_folds_are_put_together_and_kept_from_the_in_sample_row():
    facts = [fact for fact in FACTS if fact[0] != "c"]
    runs = [block(AFTER, facts=facts), block([50] * 8, crossfit=False, facts=facts)]
    table = blocked(clean(facts=facts), *runs, facts=facts)
    assert cell(table, crossfit=True)["blocked"] == pytest.approx(3 / 7)
    assert cell(table, crossfit=True)["clean"] == pytest.approx(5 / 7)
    assert cell(table, crossfit=True)["value"] == pytest.approx(2 / 5)
    assert cell(table, crossfit=False)["value"] == 1
    for row in table.iter_rows(named=True):
        assert [row[name] for name in ("excess_value", "excess_low", "spread", "p", "seeds")] == [None] * 4 + [0]


SEEDS = [[1, 20, 4, 20, 5, 30, 1, 2], [50] * 8, [1, 2, 4, 20, 50, 30, 1, 2]]


@pytest.mark.parametrize("control", ["matched", "random"])
@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize(("metric", "of"), [("hit@10", hit), ("mrr", mrr)])
def test_controls_and_excess_hold_subjects_and_seeds(control, average, metric, of):
    """The selection that is compared is the cross-fitted one, never the in-sample one."""
    controls = [block(ranks, control, seed=s) for s, ranks in enumerate(SEEDS)]
    table = blocked(clean(), block([99] * 8, crossfit=False), block(AFTER), *controls)
    found = cell(table, control=control, average=average, metric=metric)
    assert (found["crossfit"], found["seeds"], found["prompts"]) == (control == "matched", 3, 8)
    each = [drawn_drop(of(ranks), of, average) for ranks in SEEDS]
    mean, selection = np.mean(each, axis=0), drawn_drop(of(AFTER), of, average)
    spread = np.std([one[0] for one in each], ddof=1)
    reach, of_one = (t.ppf(0.975, 2) * spread * math.sqrt(1 / 3 + more) for more in (0, 1))
    assert found["value"] == pytest.approx(mean[0])
    assert found["spread"] == pytest.approx(spread)
    assert [found["low"], found["high"]] == pytest.approx(ends(mean, reach))
    assert found["excess_value"] == pytest.approx(selection[0] - mean[0])
    assert [found["excess_low"], found["excess_high"]] == pytest.approx(ends(selection - mean, of_one))
    after = np.mean([drawn_means(of(ranks), average=average)[0] for ranks in SEEDS])
    assert found["blocked"] == pytest.approx(after)


def test_seeds_that_ran_the_same_count_once():
    """Of the experts of a layer few are as often chosen: nineteen draws of two are two. What changes nothing counts."""
    pair = AFTER, [50] * 8
    table = blocked(clean(), block(AFTER), *(block(pair[s % 2], "matched", seed=s) for s in range(19)))
    found = cell(table, control="matched")
    assert (found["seeds"], found["p"]) == (2, None)
    assert found["excess_high"] - found["excess_value"] > t.ppf(0.975, 1) * found["spread"]
    same, idle = ([block(ranks, "matched", seed=s) for s in range(4)] for ranks in (AFTER, CLEAN))
    alone, idle = (cell(blocked(clean(), block(AFTER), *runs), control="matched") for runs in (same, idle))
    assert (alone["seeds"], alone["excess_value"], alone["excess_low"], alone["low"]) == (1, 0, None, None)
    assert (idle["seeds"], idle["spread"], idle["low"], idle["high"]) == (4, 0, 0, 0)


def test_one_seed_has_no_interval_and_no_selection_no_excess():
    table = blocked(clean(), block(AFTER), block(CLEAN, "matched", seed=0))
    found = cell(table, control="matched")
    assert (found["value"], found["low"], found["excess_value"], found["excess_low"]) == (0, None, 0.5, None)
    table = blocked(clean(), block(AFTER, crossfit=False), *(block(CLEAN, "random", seed=s) for s in range(20)))
    found = cell(table, control="random")
    assert (found["value"], found["excess_value"], found["excess_low"], found["p"]) == (0, None, None, None)


@pytest.mark.parametrize(("seeds", "p"), [(18, None), (19, 4 / 20), (39, 4 / 40)])
@pytest.mark.parametrize("control", ["matched", "random"])
def test_p_counts_the_seeds_that_do_as_much(control, seeds, p):
    """The selection loses 3 of 6 hits, as do seeds 0 and 1; seed 2 loses all, the others none."""
    ranks = {0: AFTER, 1: [rank + (rank > 10) for rank in AFTER], 2: [50] * 8}  # no two alike
    controls = [block(ranks.get(s, CLEAN), control, seed=s) for s in range(seeds)]
    table = blocked(clean(), block([99] * 8, crossfit=False), block(AFTER), *controls)
    assert cell(table, control=control)["p"] == (None if p is None else pytest.approx(p))
    b = cell(table, control=control, scope="relation", name="b")  # no loss: all do at least that
    assert b["p"] == (None if p is None else 1)
    assert table.filter(control="none")["p"].is_null().all()


def test_semantics_and_sizes_are_compared_with_their_own():
    other = [50] * 8
    runs = [block(AFTER), block(other, semantics="zero_weight"), block(other, size=5)]
    runs += [block(CLEAN, "matched", seed=s) for s in (0, 1)]
    runs += [block(other, "matched", seed=s, semantics="zero_weight") for s in (0, 1)]
    table = blocked(clean(), *runs)
    assert cell(table, control="matched", semantics="reroute")["excess_value"] == pytest.approx(1 / 2)
    assert cell(table, control="matched", semantics="zero_weight")["excess_value"] == 0
    assert cell(table, control="none", size=5)["value"] == 1


def test_a_matched_control_that_a_relation_does_not_have():
    """It has no row of that relation and none of all prompts; the others are as if that relation were not there."""
    whole = [block(AFTER), *(block(CLEAN, "random", seed=s) for s in (0, 1))]
    some = [block(ranks, "matched", seed=s, only="ac") for s, ranks in enumerate(SEEDS)]
    table = blocked(clean(), *whole, *some)
    matched = table.filter(control="matched")
    assert set(matched.select("scope", "name").iter_rows()) == {("relation", "a"), ("relation", "c")}
    everywhere = blocked(clean(), *whole, *(block(ranks, "matched", seed=s) for s, ranks in enumerate(SEEDS)))
    assert matched.equals(everywhere.filter(control="matched", scope="relation").filter(pl.col("name") != "b"))
    assert table.filter(pl.col("control") != "matched").equals(everywhere.filter(pl.col("control") != "matched"))
    # of b one fold alone could be had: as if there were none
    every = [block(ranks, "matched", seed=s) for s, ranks in enumerate(SEEDS)]
    half = [[row for row in one if row["relation"] != "b" or row["fold"] == 0] for one in every]
    assert blocked(clean(), *whole, *half).equals(table)


def test_a_selection_that_a_relation_does_not_have():
    controls = [block(CLEAN, "random", seed=s) for s in range(19)]
    table = blocked(clean(), block(AFTER, only="ab"), *controls)
    assert table.filter(control="none", scope="all").is_empty()
    for scope, name in (("all", None), ("relation", "c")):
        found = cell(table, control="random", scope=scope, name=name)
        assert (found["value"], found["excess_value"], found["p"]) == (0, None, None)
    assert cell(table, control="random", scope="relation", name="a")["excess_value"] == pytest.approx(2 / 3)


def test_excess_of_blocking_without_structure():
    """Every blocking is noise of one kind: at most about 5% of the excesses over matched controls exclude 0.

    The noise is shared by the prompts of a subject, as it is the subjects that are resampled; the seeds' noise counts
    in both parts, so that intervals may be wider, not narrower.
    """
    random = np.random.default_rng(1)
    facts = [("ab"[i % 3 == 0], "x", f"s{i % 40}", i % 40 % 10) for i in range(60)]

    def noise():
        of_subject = random.lognormal(0, 1, 40)
        return [max(1, round(20 * of_subject[i % 40] * random.lognormal(0, 0.5))) for i in range(60)]

    excluded = []
    for _ in range(50):
        controls = [block(noise(), "matched", seed=s, facts=facts) for s in range(5)]
        found = cell(blocked(clean(noise(), facts), block(noise(), facts=facts), *controls, facts=facts),
                     control="matched", metric="log_prob")  # fmt: skip
        excluded.append(found["excess_low"] > 0 or found["excess_high"] < 0)
    assert sum(excluded) <= binom.ppf(0.999, 50, 0.05)
    # and an effect of twice the rank is seen, so that the intervals are not merely wide
    base = noise()
    controls = [block(noise(), "matched", seed=s, facts=facts) for s in range(5)]
    table = blocked(clean(base, facts), block([4 * r for r in noise()], facts=facts), *controls, facts=facts)
    assert cell(table, control="matched", metric="log_prob")["excess_low"] > 0


# Bad input -----------------------------------------------------------------------------------------------------------


def test_rows_in_another_order_change_nothing():
    controls = [block(ranks, "matched", seed=s) for s, ranks in enumerate(SEEDS)]
    table = interventions(clean(), budget(AFTER), block(AFTER), *controls)
    shuffled, order = table.sample(fraction=1, shuffle=True, seed=3), prompts().sample(fraction=1, shuffle=True, seed=4)
    for summary in (budgets, blocking):
        assert summary(10, table, prompts()).equals(summary(10, shuffled, order))
        assert not summary(10, table, prompts(), 1).equals(summary(10, table, prompts(), 2))


def test_nothing_tested_gives_empty_tables():
    for summary in (budgets, blocking):
        assert summary(10, interventions(clean()), prompts()).is_empty()


def lacking(relation, rows):
    return [row for row in rows if not row["prompt_id"].startswith(relation)]


MATCHED = [block(AFTER, "matched", seed=s) for s in (0, 1)]


@pytest.mark.parametrize(
    ("summary", "runs", "message"),
    [
        (budgets, [budget(AFTER)], r"step 10: expert_interventions.parquet has no clean run; delete the file"),
        (
            budgets,
            [clean(), budget(AFTER)[1:]],
            r"budget top_n 1 family True tests not all prompts of a; delete expert_",
        ),
        (budgets, [clean(), lacking("c", budget(AFTER))], "not all prompts of c"),
        (budgets, [clean()[1:], budget(AFTER)], "budget .* a prompt that the clean run does not have"),
        (blocking, [block(AFTER)], r"has no clean run"),
        (blocking, [clean(), block(AFTER)[1:]], "step 10: blocking reroute 1 none True tests not all prompts of a"),
        (blocking, [clean(), block(AFTER, crossfit=False)[1:]], "none False tests not all prompts of a"),
        (
            blocking,
            [clean(), [row for row in block(AFTER) if row["fold"] == 0]],
            "none True tests not all prompts of a",
        ),
        (blocking, [clean(), [{**row, "fold": 1 - row["fold"]} for row in block(AFTER)]], "a prompt of the other fold"),
        (
            blocking,
            [clean(), block(AFTER), [{**row, "importance": "mean_weight"} for row in block(AFTER)]],
            "none True tests a prompt twice",
        ),
        (blocking, [clean(), MATCHED[0][1:]], "matched True tests not all prompts of a"),
        (blocking, [clean(), MATCHED[0], lacking("c", MATCHED[1])], "matched True tests not all prompts of c"),
        (blocking, [clean(), lacking("c", block(AFTER, "random", seed=0))], "random False tests not all prompts of c"),
    ],
)
def test_incomplete_tables_are_named(summary, runs, message):
    with pytest.raises(CollaborationError, match=message):
        summary(10, interventions(*runs), prompts())


def test_a_prompt_that_the_prompt_table_lacks_is_named():
    with pytest.raises(SampleError, match=r"c/7 is not in prompts\.parquet"):
        budgets(10, interventions(clean()), prompts(FACTS[:-1]))


def test_real_sizes_are_quick():
    """906 prompts of 12 relations, 780 subjects, 2,000 draws; four semantics, three sizes, five seeds a control."""
    facts = [(f"r{i % 12:02}", "x", f"s{i % 780}", i % 780 % 10) for i in range(906)]
    ranks = np.random.default_rng(0).integers(1, 100, 906).tolist()
    runs = [clean(ranks, facts)]
    for semantics in ("reroute", "reroute_logit", "min_logit", "zero_weight"):
        for size in (1, 5, 10):
            names = {"semantics": semantics, "size": size, "facts": facts}
            runs += [block(ranks, **names), block(ranks, crossfit=False, **names)]
            runs += [block(ranks, control, seed=s, **names) for control in ("matched", "random") for s in range(5)]
    table, known = interventions(*runs), prompts(facts)
    start = time.process_time()
    assert len(blocking(10, table, known)) == 12 * 4 * (2 + 12) * 3
    assert time.process_time() - start < 30
