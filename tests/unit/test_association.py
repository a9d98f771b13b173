"""Heads against experts: r against scipy, the null against plain loops, and what no structure at all must look like."""

import itertools
import time

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from scipy.stats import binom, chisquare, kstest, pearsonr

from moescope import tables
from moescope.association import (
    AssociationError,
    associate,
    correlation_of,
    expert_correlation,
    permutations_within,
)
from moescope.statistics import SubjectBootstrap

METHOD = "top_neuron_frequency"
PAIR = ("head_layer", "head", "layer", "expert")
LAYERS, HEADS, EXPERTS = 3, 2, 4
#: Relation of every prompt; subject i is of group i % 10, groups 0-4 are fold 0.
RELATIONS = ["a"] * 20 + ["b"] * 14 + ["c"] * 10


def prompts(relations=RELATIONS, group=lambda i: i % 10, subject=lambda i: f"s{i:03}"):
    rows = [(f"{r}/{i:03}", r, "x", subject(i), "o", "{}", "t", group(i)) for i, r in enumerate(relations)]
    return tables.of_rows(rows, "prompts")


def heads_of(lpi, asked):
    """Table heads of lpi [prompts, layers, heads], prompts as in the table."""
    shape = lpi.shape
    p, layer, head = (one.ravel() for one in np.indices(shape))
    columns = {"prompt_id": asked["prompt_id"].gather(p), "layer": layer, "head": head, "lpi": lpi.ravel()}
    return tables.check(pl.DataFrame(columns), "heads")


def routing_of(probability, asked, first=0, weight=None):
    """Table routing of probability [prompts, layers, experts] (None: not told), layers from ``first`` on."""
    shape = (weight if probability is None else probability).shape
    p, layer, expert = (one.ravel() for one in np.indices(shape))
    told = pl.lit(None, pl.Float32) if probability is None else pl.Series(probability.ravel())
    weight = np.zeros(shape) if weight is None else weight
    columns = {"prompt_id": asked["prompt_id"].gather(p), "layer": layer + first, "expert": expert}
    frame = pl.DataFrame({**columns, "weight": weight.ravel()}).with_columns(slot=None, probability=told, lpi=0.0)
    return tables.check(frame, "routing")


def importance_of(*listed, method=METHOD, fold=None):
    """Table expert_importance of (relation, rank, layer, expert)."""
    rows = [(relation, method, fold, rank, layer, expert, 1 / rank) for relation, rank, layer, expert in listed]
    return tables.of_rows(rows, "expert_importance")


SOME = importance_of(*((r, i + 1, layer, 0) for r in "abc" for i, layer in enumerate((2, 1, 0))))


def unrelated(seed, relations=RELATIONS, layers=LAYERS, heads=HEADS, experts=EXPERTS, spread_of_c=1.0):
    """LPI and probabilities without any association within relations, but relations that differ.

    Relation means of both sides agree: without centring all would correlate.
    """
    random = np.random.default_rng(seed)
    stratum = np.unique(relations, return_inverse=True)[1]
    spread = np.where(np.array(relations) == "c", spread_of_c, 1.0)[:, None, None]
    made = []
    for units in (heads, experts):
        noise = random.standard_normal((len(relations), layers, units))
        made.append((noise * spread + 50 * stratum[:, None, None]) / 1000)
    return made


def centred(values, relations):
    """Minus the mean of the relation."""
    values, relations = np.asarray(values, dtype=np.float64), np.asarray(relations)
    names, place = np.unique(relations, return_inverse=True)
    return values - np.array([values[relations == name].mean() for name in names])[place]


def picked(table, relation=None, fold=None):
    return table.filter(pl.col("relation").eq_missing(pl.lit(relation)), pl.col("fold").eq_missing(pl.lit(fold)))


def column(frame, layer, number):
    """The float32 values of one head or expert, prompts ascending."""
    unit, value = ("head", "lpi") if "head" in frame.columns else ("expert", "probability")
    return frame.filter(pl.col("layer") == layer, pl.col(unit) == number).sort("prompt_id")[value].to_numpy()


def orders_of(relations, number, seed):
    """The permutations of prompts of which each has a subject of its own."""
    return permutations_within(np.unique(relations, return_inverse=True)[1], np.arange(len(relations)), number, seed)


def brute_force(heads, routing, asked, keep, permutations, seed):
    """r of every causal pair on the prompts kept and the largest |r| of every permutation, in the plainest way."""
    relations = asked["relation"].to_numpy()[keep]
    orders = list(orders_of(relations, permutations, seed))
    units = [frame.select("layer", unit).unique().rows() for frame, unit in ((heads, "head"), (routing, "expert"))]
    r, permuted = {}, np.zeros(permutations)
    for head, expert in itertools.product(*units):
        if head[0] <= expert[0]:
            x = centred(column(heads, *head)[keep], relations)
            y = centred(column(routing, *expert)[keep], relations)
            r[head + expert] = pearsonr(x, y)[0]
            permuted = np.maximum(permuted, [abs(np.corrcoef(x[order], y)[0, 1]) for order in orders])
    return r, permuted


def assert_is_search(rows, r, permuted, strongest, n):
    """Rows are the strongest pairs of a brute-force search, with its r, p and null."""
    first = sorted(r, key=lambda pair: -abs(r[pair]))[:strongest]
    assert set(rows.select(PAIR).rows()) == set(first)
    for row in rows.iter_rows(named=True):
        value = r[tuple(row[name] for name in PAIR)]
        assert row["r"] == pytest.approx(value, abs=1e-12)
        assert row["p"] == (1 + sum(permuted >= abs(value))) / (1 + len(permuted))
        assert row["null_median"] == pytest.approx(np.median(permuted), abs=1e-6)
        assert row["null_95"] == pytest.approx(np.percentile(permuted, 95), abs=1e-6)
        assert (row["pairs"], row["prompts"]) == (len(r), n)


def test_search_null_and_test_equal_plain_loops():
    """All prompts, either fold, and a relation: scipy on centred values, every pair and permutation in a loop."""
    asked = prompts()
    lpi, probability = unrelated(0)
    heads, routing = heads_of(lpi, asked), routing_of(probability, asked)
    table = associate(heads, routing, SOME, asked, permutations=49, strongest=5, seed=3)
    group, relation = asked["group"].to_numpy(), asked["relation"].to_numpy()
    everything = brute_force(heads, routing, asked, np.full(len(asked), True), 49, 3)
    assert len(everything[0]) == HEADS * EXPERTS * 6
    assert_is_search(picked(table), *everything, 5, 44)
    assert picked(table)["r_tested"].is_null().all()
    assert picked(table)["p_tested"].is_null().all()
    for fold, inside in ((0, group < 5), (1, group >= 5)):
        rows = picked(table, fold=fold)
        assert_is_search(rows, *brute_force(heads, routing, asked, ~inside, 49, 3), 5, sum(~inside))
        for row in rows.iter_rows(named=True):
            x = centred(column(heads, row["head_layer"], row["head"])[inside], relation[inside])
            y = centred(column(routing, row["layer"], row["expert"])[inside], relation[inside])
            assert row["r_tested"] == pytest.approx(pearsonr(x, y)[0], abs=1e-12)
            null = [abs(np.corrcoef(x[order], y)[0, 1]) for order in orders_of(relation[inside], 49, 3)]
            assert row["p_tested"] == (1 + sum(np.array(null) >= abs(row["r_tested"]))) / 50
    leading = lpi[relation == "b"].mean(axis=0).ravel()
    top = np.argsort(-leading)[:3].tolist()
    among = heads.filter((pl.col("layer") * HEADS + pl.col("head")).is_in(top))
    experts = routing.filter(pl.col("expert") == 0)
    assert_is_search(picked(table, "b"), *brute_force(among, experts, asked, relation == "b", 49, 3), 9, 14)


def test_r_is_scipys_on_raw_values_of_a_single_relation():
    asked = prompts(["a"] * 12)
    lpi, probability = unrelated(5, ["a"] * 12)
    heads, routing = heads_of(lpi, asked), routing_of(probability, asked)
    pairs = [(0, 1, 2, 3), (2, 0, 0, 1)]  # the second is acausal: named pairs may be
    found = correlation_of(heads, routing, asked, pairs, permutations=99)
    for one, pair in zip(found, pairs, strict=True):
        x, y = column(heads, *pair[:2]).astype(float), column(routing, *pair[2:]).astype(float)
        assert one.r == pytest.approx(pearsonr(x, y)[0], abs=1e-12)
        assert one.p == pytest.approx(pearsonr(x, y)[1], abs=0.15)
        assert one.low < one.r < one.high


# What must be found, and what must not -------------------------------------------------------------------------------


def planted(x, y, prompts_of=slice(None), strength=1.0, seed=11):
    """Unrelated tables but for one head (layer, head) that sets one expert (layer, expert) on some prompts."""
    lpi, probability = unrelated(seed)
    expert = probability[prompts_of, y[0], y[1]]
    probability[prompts_of, y[0], y[1]] = 0.3 * expert + strength * lpi[prompts_of, x[0], x[1]]
    return lpi, probability


def found_in(lpi, probability, asked=None, importance=SOME, **options):
    asked = prompts() if asked is None else asked
    options = {"permutations": 199, **options}
    return associate(heads_of(lpi, asked), routing_of(probability, asked), importance, asked, **options)


@pytest.mark.parametrize("strength", [1.0, -1.0])
def test_a_planted_pair_is_found_on_both_folds_and_replicated(strength):
    table = found_in(*planted((1, 1), (2, 3), strength=strength), strongest=1)
    for fold in (None, 0, 1):
        (row,) = picked(table, fold=fold).rows(named=True)
        assert tuple(row[name] for name in PAIR) == (1, 1, 2, 3)
        assert strength * row["r"] > 0.9 > row["null_95"]
        assert row["p"] == 1 / 200
        if fold is not None:
            assert strength * row["r_tested"] > 0.9
            assert row["p_tested"] == 1 / 200


def test_heads_and_experts_of_one_layer_are_causal():
    table = found_in(*planted((2, 0), (2, 3)), strongest=1)
    assert picked(table).select(PAIR).row(0) == (2, 0, 2, 3)


@pytest.mark.parametrize(("holds", "found_for", "not_for"), [(range(5, 10), 0, 1), (range(5), 1, 0)])
def test_a_fold_is_tested_with_what_the_other_one_found(holds, found_for, not_for):
    """An association that only the groups ``holds`` show is found for the other fold, and does not replicate there."""
    inside = [i for i in range(len(RELATIONS)) if i % 10 in holds]
    table = found_in(*planted((0, 1), (2, 3), inside), strongest=1)
    (row,) = picked(table, fold=found_for).rows(named=True)
    assert tuple(row[name] for name in PAIR) == (0, 1, 2, 3)
    assert (row["r"] > 0.9, row["p"]) == (True, 1 / 200)
    assert row["p_tested"] > 0.05
    assert abs(row["r_tested"]) < 0.8
    assert row["prompts"] == len(inside)
    assert picked(table, fold=not_for).select(PAIR).row(0) != (0, 1, 2, 3)


def test_an_acausal_pair_is_neither_found_nor_part_of_the_null():
    """r = 1 of a head behind the expert, in relations whose permutations often leave the order as it is."""
    lpi, probability = unrelated(4)
    hidden = probability.copy()
    hidden[:, 0, 2] = lpi[:, 2, 1]
    before, table = found_in(lpi, probability), found_in(lpi, hidden)
    others = ~((pl.col("layer") == 0) & (pl.col("expert") == 2))
    assert picked(table)["r"].abs().max() < 0.9
    assert set(table.filter(pl.col("head_layer") > pl.col("layer")).rows()) == set()
    assert picked(table)["pairs"].unique().to_list() == [HEADS * EXPERTS * 6]
    same = picked(table).filter(others).join(picked(before).filter(others), on=PAIR)
    assert same["r"].to_list() == same["r_right"].to_list()
    # where the only layer that routes is the last, every head lies before it
    asked, last = prompts(), importance_of(("a", 1, 2, 0))
    late = associate(heads_of(lpi, asked), routing_of(probability[:, :1], asked, 2), last, asked)
    assert picked(late)["pairs"].unique().to_list() == [3 * HEADS * EXPERTS]


def test_what_only_tells_relations_apart_is_not_found():
    """Raw r of all pairs is near 1; within relations there is nothing."""
    lpi, probability = unrelated(8)
    raw = np.corrcoef(lpi[:, 0, 0], probability[:, 2, 3])[0, 1]
    table = found_in(lpi, probability)
    assert raw > 0.7
    assert picked(table)["r"].abs().max() < 0.7
    assert picked(table)["p"].min() > 0.05


SEEDS = 50
NULL = ["a"] * 20 + ["b"] * 20 + ["c"] * 12


@pytest.fixture(scope="module")
def structureless():
    """The strongest pair of 50 seeds, found on all prompts and on either fold.

    Both sides of c spread ten times as far as those of the others: were prompts permuted out of their relation, the
    null would be too narrow.
    """
    rows = []
    for seed in range(SEEDS):
        lpi, probability = unrelated(seed, NULL, heads=4, experts=8, spread_of_c=10)
        asked = prompts(NULL)
        one = importance_of(("a", 1, 0, 0))
        table = found_in(lpi, probability, asked, one, strongest=1, permutations=99, seed=seed)
        for fold in (None, 0, 1):
            (row,) = picked(table, fold=fold).rows(named=True)
            heads, routing = heads_of(lpi, asked), routing_of(probability, asked)
            pair = tuple(row[name] for name in PAIR)
            alone = None
            if fold is None:
                alone = correlation_of(heads, routing, asked, [pair], permutations=99, seed=seed)[0].p
            rows.append({**row, "alone": alone})
    return rows


def test_without_structure_p_is_uniform_though_the_best_pair_was_searched_for(structureless):
    """p of the maximum holds its 5%; p of the best of 192 pairs, as if nobody had searched, is all but always small."""
    found = [row for row in structureless if row["fold"] is None]
    p, alone = (np.array([row[name] for row in found]) for name in ("p", "alone"))
    low, high = binom.ppf([0.001, 0.999], SEEDS, 0.05)
    assert low <= (p <= 0.05).sum() <= high
    assert (alone <= 0.05).mean() > 0.9
    jitter = np.random.default_rng(0).random(SEEDS) / 100  # p has steps of 1/100
    assert kstest(p - jitter, "uniform").pvalue > 0.01


def test_without_structure_nothing_replicates(structureless):
    """On the other fold p of a pair alone is uniform, and r as often above 0 as below."""
    tested = [row for row in structureless if row["fold"] is not None]
    p = np.array([row["p_tested"] for row in tested])
    low, high = binom.ppf([0.001, 0.999], len(tested), 0.05)
    assert low <= (p <= 0.05).sum() <= high
    jitter = np.random.default_rng(0).random(len(p)) / 100
    assert kstest(p - jitter, "uniform").pvalue > 0.01
    same_sign = sum(row["r"] * row["r_tested"] > 0 for row in tested)
    low, high = binom.ppf([0.001, 0.999], len(tested), 0.5)
    assert low <= same_sign <= high


def test_the_larger_the_search_the_larger_the_null():
    """Of many pairs on 24 prompts, |r| far above any single pair's 5% is what chance gives."""
    few, many = (
        found_in(*unrelated(1, ["a"] * 24, heads=n, experts=4 * n), prompts(["a"] * 24), importance_of(("a", 1, 0, 0)))
        for n in (1, 16)
    )
    assert picked(few)["null_median"][0] < 0.6 < picked(many)["null_median"][0]
    assert picked(many)["r"].abs().max() > 0.6
    assert picked(many)["p"].min() > 0.05


# Permutations --------------------------------------------------------------------------------------------------------


def test_permutations_stay_within_strata_and_are_all_as_likely():
    stratum = np.array([1, 0, 1, 0, 0, 2])
    orders = np.array(list(permutations_within(stratum, np.arange(6), 6000, 0)))
    assert (stratum[orders] == stratum).all()
    assert (np.sort(orders) == np.arange(6)).all()
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 2 * 6
    assert chisquare(counts).pvalue > 0.001


def test_permutations_move_subjects_as_a_whole():
    """Subjects u, v, w are asked in strata 0 and 1, x and y twice in 0, z in 1 alone: it has no like and stays."""
    subject = np.array(list("xuvwxyyvuzw"))
    stratum = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    orders = np.array(list(permutations_within(stratum, subject, 6000, 0)))
    assert (stratum[orders] == stratum).all()
    assert (np.sort(orders) == np.arange(11)).all()
    for one in "uvwxyz":
        moved = subject[orders[:, subject == one]]
        assert (moved == moved[:, :1]).all()
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6 * 2
    assert chisquare(counts).pvalue > 0.001
    assert (orders[:, 9] == 9).all()


def test_subjects_of_two_relations_do_not_make_the_null_too_narrow():
    """Head and expert of no association, but both much alike on the two prompts of a subject, as on the first and the
    last letter of a word. p holds its 5%; with prompts permuted as if they had nothing in common it does not."""
    relations, of_subject = ["a"] * 30 + ["b"] * 30, np.tile(np.arange(30), 2)
    subject = {True: lambda i: f"s{i % 30}", False: lambda i: f"s{i}"}
    p = {True: [], False: []}
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        lpi, probability = (
            random.standard_normal((30, 1, n))[of_subject] + 0.3 * random.standard_normal((60, 1, n)) for n in (4, 8)
        )
        for together, names in subject.items():
            asked = prompts(relations, subject=names)
            table = found_in(
                lpi, probability, asked, importance_of(("a", 1, 0, 0)), permutations=99, strongest=1, seed=seed
            )
            p[together].append(picked(table)["p"][0])
    low, high = binom.ppf([0.001, 0.999], SEEDS, 0.05)
    assert low <= (np.array(p[True]) <= 0.05).sum() <= high
    assert kstest(np.array(p[True]) - np.random.default_rng(0).random(SEEDS) / 100, "uniform").pvalue > 0.01
    assert (np.array(p[False]) <= 0.05).sum() > high


def test_permutations_depend_on_prompts_and_seed_alone():
    """Two models, the second with more heads and other experts: the pair they share has one p_tested and one null."""
    lpi, probability = planted((0, 0), (2, 3))
    one = found_in(lpi[:, :1, :1], probability[:, 2:, 3:], importance=importance_of(("a", 1, 0, 0)))
    flat = np.zeros((len(RELATIONS), 1, 5))
    both = found_in(
        np.concatenate([lpi[:, :1, :1], flat], 2),
        np.concatenate([probability[:, 2:, 3:], flat], 2),
        importance=importance_of(("a", 1, 0, 0)),
    )
    assert_frame_equal(both, one, abs_tol=2e-6)
    assert len(picked(one)) == 1
    other = found_in(lpi[:, :1, :1], probability[:, 2:, 3:], importance=importance_of(("a", 1, 0, 0)), seed=1)
    assert picked(other)["null_median"][0] != picked(one)["null_median"][0]


@pytest.mark.parametrize("seed", range(6))
def test_orders_that_leave_a_pair_as_it_is_reach_its_r(seed):
    """Of two relations of two prompts one order in four is the sample itself and one its mirror image, of the same |r|:
    they count, though float32 gives a slightly other r. The remaining two are of another |r|, larger or smaller."""
    asked = prompts(list("aabb"), group=lambda i: 0)
    lpi, probability = np.random.default_rng(seed).standard_normal((2, 4, 1, 1))
    table = found_in(lpi, probability, asked, importance_of(("a", 1, 0, 0)), permutations=999)
    assert table["relation"].is_null().all()  # two prompts are no search
    (row,) = picked(table).rows(named=True)
    of_a, of_b = ((x[1] - x[0]) * (y[1] - y[0]) for x, y in ((lpi[:2], probability[:2]), (lpi[2:], probability[2:])))
    assert row["p"] == (1 if of_a * of_b < 0 else pytest.approx(0.5, abs=0.06))


# Which pairs, in which order -----------------------------------------------------------------------------------------


def test_leading_heads_and_experts_of_a_relation():
    """The three heads of largest signed mean LPI on the relation's prompts, the first three experts, causal pairs."""
    lpi, probability = unrelated(2)
    relation = np.array(RELATIONS)
    for place, mean in {(0, 1): 3, (1, 0): 1, (2, 0): 2, (2, 1): -9, (1, 1): 0, (0, 0): 0}.items():
        lpi[relation == "a", *place] += mean
    lpi[relation == "b", 2, 1] += 99
    listed = importance_of(("a", 1, 1, 3), ("a", 2, 2, 0), ("a", 3, 0, 2), ("a", 4, 2, 1))
    elsewhere = [importance_of(("a", 1, 2, 2), fold=0), importance_of(("a", 1, 2, 2), method="summed_lpi")]
    table = found_in(lpi, probability, importance=pl.concat([listed, *elsewhere]))
    expected = [(0, 1, 0, 2), (0, 1, 1, 3), (0, 1, 2, 0), (1, 0, 1, 3), (1, 0, 2, 0), (2, 0, 2, 0)]
    rows = picked(table, "a")
    assert rows.select(PAIR).rows() == expected
    assert rows.select("pairs", "prompts").unique().rows() == [(6, 20)]
    assert picked(table, "b").is_empty()  # nothing is listed for it
    other = found_in(lpi, probability, importance=pl.concat([listed, *elsewhere]), method="summed_lpi")
    assert other.filter(pl.col("relation") == "a").select("layer", "expert").unique().rows() == [(2, 2)]


def test_equal_associations_go_by_layer_head_and_expert():
    lpi, probability = unrelated(6)
    lpi[:, 0, 1] = lpi[:, 1, 0] = -3 * lpi[:, 1, 1]
    probability[:, 2, 1] = probability[:, 1, 3] = probability[:, 0, 2] = lpi[:, 1, 1] * 0.25
    order = [(0, 1, 0, 2), (0, 1, 1, 3), (0, 1, 2, 1), (1, 0, 1, 3), (1, 0, 2, 1), (1, 1, 1, 3), (1, 1, 2, 1)]
    for n in range(1, len(order) + 1):
        found = picked(found_in(lpi, probability, strongest=n, permutations=9)).select(PAIR).rows()
        assert sorted(found) == order[:n]


def test_order_of_rows_changes_nothing():
    asked = prompts()
    lpi, probability = unrelated(9)
    given = heads_of(lpi, asked), routing_of(probability, asked), SOME, asked
    shuffled = [frame.sample(fraction=1, shuffle=True, seed=i) for i, frame in enumerate(given)]
    assert associate(*shuffled, permutations=49).equals(associate(*given, permutations=49))
    pairs = [(0, 0, 1, 1)]
    alone = [correlation_of(one[0], one[1], one[3], pairs, permutations=49) for one in (given, shuffled)]
    assert alone[0] == alone[1]
    experts = [expert_correlation(one[1], one[3], (0, 0), (1, 1), permutations=49) for one in (given, shuffled)]
    assert experts[0] == experts[1]


# What says nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-9, 1.0])
def test_constant_columns_are_not_searched(value):
    """A head of one value, and an expert that has one in every relation, another in each."""
    lpi, probability = unrelated(7)
    lpi[:, 0, 0] = value * (1 + 1e-7 * (np.arange(len(RELATIONS)) % 2))  # at most one step of float32
    probability[:, 2, 1] = np.array([0.1, 0.37, 0.9])[np.unique(RELATIONS, return_inverse=True)[1]]
    table = found_in(lpi, probability, strongest=99)
    everything = picked(table)
    assert len(everything) == everything["pairs"][0] == HEADS * EXPERTS * 6 - (3 * EXPERTS + 6) + 1
    assert everything.filter(pl.col("head_layer") == 0, pl.col("head") == 0).is_empty()
    assert everything.filter(pl.col("layer") == 2, pl.col("expert") == 1).is_empty()
    pairs = [(0, 0, 1, 1), (1, 1, 2, 1)]
    asked = prompts()
    found = correlation_of(heads_of(lpi, asked), routing_of(probability, asked), asked, pairs)
    assert [tuple(one) for one in found] == [(None,) * 4] * 2


def test_a_column_that_is_constant_where_it_is_tested_has_no_test():
    lpi, probability = planted((0, 1), (2, 3))
    fold = np.array([i % 10 < 5 for i in range(len(RELATIONS))])
    probability[fold, 2, 3] = 0.25
    table = found_in(lpi, probability, strongest=1)
    (row,) = picked(table, fold=0).rows(named=True)
    assert tuple(row[name] for name in PAIR) == (0, 1, 2, 3)
    assert (row["r_tested"], row["p_tested"]) == (None, None)
    assert picked(table, fold=1).select(PAIR).row(0) != (0, 1, 2, 3)


def test_nothing_varies():
    lpi, probability = unrelated(7)
    assert found_in(np.zeros_like(lpi), probability).is_empty()


def test_prompts_alone_in_their_relation_do_not_count():
    """d has a single prompt; in fold 0 b has one, too: they change nothing but could not be permuted."""
    relations = ["a"] * 12 + ["b"] * 7 + ["d"]
    place = [*range(12), 0, 5, 6, 7, 8, 9, 5, 1]
    asked = prompts(relations, group=lambda i: place[i] % 10)
    lpi, probability = unrelated(3, relations)
    lpi[-1], probability[-1] = 1e6, -1e6
    table = found_in(lpi, probability, asked, importance_of(("a", 1, 2, 0), ("d", 1, 2, 0)))
    kept = [i for i in range(20) if relations[i] != "d"]
    alone = found_in(lpi[kept], probability[kept], asked[kept], importance_of(("a", 1, 2, 0)))
    assert table.equals(alone)
    assert picked(table, fold=1)["prompts"].unique().to_list() == [7]  # of a: groups 0 1 2 3 4 0 1
    assert picked(table, fold=0)["prompts"].unique().to_list() == [5 + 6]


def test_too_few_prompts_have_no_rows_and_no_test():
    asked = prompts(["a"] * 10, group=lambda i: 0 if i < 3 else 5)
    lpi, probability = unrelated(3, ["a"] * 10)
    table = found_in(lpi, probability, asked, importance_of(("a", 1, 2, 0)))
    assert picked(table, fold=1).is_empty()  # three prompts to find on
    rows = picked(table, fold=0)  # found on seven, three to test on
    assert len(rows) == 10
    assert rows["r_tested"].is_null().all()
    assert rows["p_tested"].is_null().all()
    few = prompts(["a"] * 3)
    named = correlation_of(heads_of(lpi[:3], few), routing_of(probability[:3], few), few, [(0, 0, 1, 1)])
    assert [tuple(one) for one in named] == [(None,) * 4]
    assert found_in(lpi[:3], probability[:3], few, importance_of(("a", 1, 2, 0))).is_empty()


# Two experts, intervals ----------------------------------------------------------------------------------------------


def test_interval_and_p_of_a_named_pair_equal_copied_prompts():
    """Draws of subjects (two prompts each, in two relations) as lists of copied prompts, centred anew."""
    relations = ["a"] * 15 + ["b"] * 15
    asked = prompts(relations, subject=lambda i: f"s{i % 15:02}")
    _, probability = unrelated(3, relations)
    probability[:, 1, 2] += 0.2 * probability[:, 0, 1]
    routing = routing_of(probability, asked)
    found = expert_correlation(routing, asked, (0, 1), (1, 2), permutations=199)
    x, y = column(routing, 0, 1), column(routing, 1, 2)
    assert found.r == pytest.approx(pearsonr(centred(x, relations), centred(y, relations))[0], abs=1e-12)
    drawn = []
    for counts in SubjectBootstrap.draw({f"s{i:02}" for i in range(15)}).counts[1:].astype(int):
        rows = np.repeat(np.arange(30), np.tile(counts, 2))
        again = np.array(relations)[rows]
        drawn.append(np.corrcoef(centred(x[rows], again), centred(y[rows], again))[0, 1])
    assert [found.low, found.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-9)
    stratum, subject = np.repeat([0, 1], 15), np.tile(np.arange(15), 2)
    x, y = centred(x, relations), centred(y, relations)
    null = np.array([abs(np.corrcoef(x[order], y)[0, 1]) for order in permutations_within(stratum, subject, 199, 0)])
    assert found.p == (1 + (null >= found.r).sum()) / 200


def test_one_subject_has_no_interval():
    asked = prompts(["a"] * 8, subject=lambda i: "s")
    _, probability = unrelated(3, ["a"] * 8)
    found = expert_correlation(routing_of(probability, asked), asked, (0, 1), (1, 2))
    assert found.r is not None
    assert found.p is not None
    assert (found.low, found.high) == (None, None)


# Weights, and bad input ----------------------------------------------------------------------------------------------


def test_weights_stand_in_for_probabilities():
    asked = prompts()
    lpi, probability = unrelated(12)
    weight = np.where(probability > np.median(probability, axis=2, keepdims=True), probability, 0.0)
    heads = heads_of(lpi, asked)
    told = associate(heads, routing_of(weight, asked), SOME, asked, permutations=49)
    used = associate(heads, routing_of(probability, asked, weight=weight), SOME, asked, by="weight", permutations=49)
    untold = associate(heads, routing_of(None, asked, weight=weight), SOME, asked, by="weight", permutations=49)
    assert used.equals(told)
    assert untold.equals(told)
    assert not used.equals(associate(heads, routing_of(probability, asked), SOME, asked, permutations=49))


def test_bad_input_is_named():
    asked = prompts()
    lpi, probability = unrelated(12)
    heads, routing = heads_of(lpi, asked), routing_of(probability, asked)
    untold = routing.with_columns(probability=pl.when(pl.col("layer") < 2).then("probability"))
    for call in (
        lambda: associate(heads, untold, SOME, asked),
        lambda: correlation_of(heads, untold, asked, [(0, 0, 1, 1)]),
        lambda: expert_correlation(untold, asked, (0, 0), (1, 1)),
    ):
        with pytest.raises(AssociationError, match=r"layer 2: .*set collaboration\.association to weight"):
            call()
    cases = {
        "experts by 'logit' are unknown": lambda: associate(heads, routing, SOME, asked, by="logit"),
        "lists no experts by summed_lpi": lambda: associate(heads, routing, SOME, asked, method="summed_lpi"),
        r"heads\.parquet does not hold every head on every prompt": lambda: associate(heads[1:], routing, SOME, asked),
        r"routing\.parquet does not hold every expert": lambda: associate(heads, routing[:-1], SOME, asked),
        r"heads\.parquet does not": lambda: associate(heads, routing, SOME, asked[1:]),
        "layer 2 has no expert 4": lambda: associate(heads, routing, importance_of(("a", 1, 2, 4)), asked),
        "layer 3 has no head 0": lambda: correlation_of(heads, routing, asked, [(3, 0, 2, 0)]),
        "layer 0 has no expert 9": lambda: expert_correlation(routing, asked, (0, 0), (0, 9)),
    }
    for message, call in cases.items():
        with pytest.raises(AssociationError, match=message):
            call()


def test_real_sizes_are_quick():
    """384 heads and 1,440 experts on 906 prompts; 20 permutations of the 1,000."""
    relations = [f"r{i % 12:02}" for i in range(906)]
    lpi, probability = unrelated(0, relations, layers=24, heads=16, experts=60)
    asked = prompts(relations)
    heads, routing = heads_of(lpi, asked), routing_of(probability, asked)
    start = time.process_time()
    table = associate(heads, routing, importance_of(("r00", 1, 0, 0)), asked, permutations=20)
    assert time.process_time() - start < 10
    assert picked(table)["pairs"].unique().to_list() == [288_000]
