"""Which experts are blocked, and their controls, against sets by hand and controls by enumeration."""

import itertools

import numpy as np
import polars as pl
import pytest

from moescope import expert_sets, tables
from moescope.expert_sets import Blocked
from moescope.selection import SelectionError

LAYERS, EXPERTS = (1, 2, 4), 24
RELATIONS = ("capital", "colour", "language")
METHOD = "top_neuron_frequency"
PROMPTS = pl.DataFrame(
    {
        "prompt_id": [f"{relation}/{i}" for relation in RELATIONS for i in range(6)],
        "relation": [relation for relation in RELATIONS for _ in range(6)],
        "group": [0, 4, 5, 9, 2, 7] * 3,
    }
)
PARTS, LABELS = expert_sets.parts(PROMPTS)
FOLD_OF = {0: 0, 4: 0, 2: 0, 5: 1, 9: 1, 7: 1}


def leading(lists):
    """A table ``expert_importance``: {(relation, fold): experts}, with another method's lists beside them."""
    rows = []
    for (relation, fold), experts in lists.items():
        for rank, (layer, expert) in enumerate(experts, 1):
            rows.append((relation, METHOD, fold, rank, layer, expert, 1 / rank))
            rows.append((relation, "summed_lpi", fold, rank, layer, (expert + 1) % EXPERTS, 1 / rank))
    return tables.of_rows(rows, "expert_importance")


def some_lists(seed=0):
    random = np.random.default_rng(seed)
    everyone = [(layer, e) for layer in LAYERS for e in range(EXPERTS)]
    keys = [(relation, fold) for relation in RELATIONS for fold in (None, 0, 1)]
    return {key: [everyone[i] for i in random.permutation(len(everyone))[:10]] for key in keys}


def some_hits(seed=0):
    random = np.random.default_rng(seed)
    return {layer: random.integers(0, 500, (len(PARTS), EXPERTS)) for layer in LAYERS}


LISTS, HITS = some_lists(), some_hits()
PLAN, LEFT_OUT = expert_sets.plan(leading(LISTS), METHOD, PARTS, HITS, seeds=3)


def those(plan, **fields):
    return [one for one in plan if all(getattr(one, name) == value for name, value in fields.items())]


def test_parts_are_relations_and_folds_of_subjects():
    assert [(relation, fold) for relation in RELATIONS for fold in (0, 1)] == PARTS
    for label, relation, group in zip(LABELS, PROMPTS["relation"], PROMPTS["group"], strict=True):
        assert PARTS[label] == (relation, FOLD_OF[group])


def test_parts_without_prompts_are_none():
    names, labels = expert_sets.parts(PROMPTS.filter(pl.col("group") < 5))
    assert names == [(relation, 0) for relation in RELATIONS]
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_everything_is_planned_once():
    names = [(one.size, one.control, one.folds, one.seed) for one in PLAN]
    assert len(set(names)) == len(names)
    assert set(names) == {
        (size, *rest)
        for size in (1, 5, 10)
        for rest in [
            ("none", False, None),
            ("none", True, None),
            *(("random", False, k) for k in range(3)),
            *(("matched", True, k) for k in range(3)),
        ]
    }
    assert LEFT_OUT == []
    assert all(set(one.sets) == set(PARTS) for one in PLAN)


@pytest.mark.parametrize("size", [1, 5, 10])
def test_the_leading_experts_of_all_prompts_and_of_the_other_fold(size):
    (inside,), (crossed,) = (those(PLAN, size=size, control="none", folds=folds) for folds in (False, True))
    for relation, fold in PARTS:
        assert inside.sets[relation, fold] == tuple(LISTS[relation, None][:size])
        assert crossed.sets[relation, fold] == tuple(LISTS[relation, fold][:size])
    assert inside.first == min(layer for relation in RELATIONS for layer, _ in LISTS[relation, None][:size])


def test_random_controls_are_the_same_in_all_prompts():
    everyone = {(layer, e) for layer in LAYERS for e in range(EXPERTS)}
    drawn = set()
    for one in those(PLAN, control="random"):
        (chosen,) = set(one.sets.values())
        assert len(chosen) == len(set(chosen)) == one.size
        assert set(chosen) <= everyone
        drawn.add(chosen)
    assert len(drawn) == 9


def test_random_controls_come_from_all_experts_alike():
    counts = dict.fromkeys(((layer, e) for layer in LAYERS for e in range(EXPERTS)), 0)
    for seed in range(200):
        plan, _ = expert_sets.plan(leading({}), METHOD, PARTS, HITS, seeds=1, seed=seed)
        for one in those(plan, size=10):
            for expert in one.sets[PARTS[0]]:
                counts[expert] += 1
    mean = 200 * 10 / len(counts)
    assert max(abs(n - mean) for n in counts.values()) < 4 * mean**0.5


def outcomes(chosen, hits):
    """Every control that the rule allows: by layer and number, one of the two nearest that are not taken."""
    found = [(set(chosen), ())]
    for layer, expert in sorted(chosen):
        following = []
        for taken, sofar in found:
            rest = [e for e in range(EXPERTS) if (layer, e) not in taken]
            off = {e: abs(int(hits[layer][e]) - int(hits[layer][expert])) for e in rest}
            second = sorted(off.values())[:2][-1]
            for e in rest:
                if off[e] <= second:
                    following.append((taken | {(layer, e)}, (*sofar, (layer, e))))
        found = following
    return {tuple(sorted(sofar)) for _, sofar in found}


@pytest.mark.parametrize("size", [1, 5, 10])
def test_matched_controls_are_nearest_in_how_often_they_are_chosen(size):
    (crossed,) = those(PLAN, size=size, control="none", folds=True)
    for one in those(PLAN, size=size, control="matched"):
        for part, control in one.sets.items():
            chosen = crossed.sets[part]
            assert sorted(layer for layer, _ in control) == sorted(layer for layer, _ in chosen)
            assert len(set(control) | set(chosen)) == 2 * size
            if size < 10:
                assert control in outcomes(chosen, {layer: of[PARTS.index(part)] for layer, of in HITS.items()})


def test_both_of_the_nearest_are_drawn_and_nobody_else():
    hits = {0: np.array([50, 0, 53, 48, 60, 90])}
    drawn = [expert_sets.matched([(0, 0)], hits, np.random.default_rng(seed)) for seed in range(60)]
    counts = {control: drawn.count(control) for control in drawn}
    assert counts.keys() == {((0, 2),), ((0, 3),)}
    assert min(counts.values()) > 15


def test_equally_near_ones_are_drawn_alike():
    hits = {0: np.array([50, 40, 60, 40, 60, 90])}
    drawn = {expert_sets.matched([(0, 0)], hits, np.random.default_rng(seed)) for seed in range(80)}
    assert drawn == {((0, e),) for e in (1, 2, 3, 4)}


def test_controls_of_half_a_layer_are_the_other_half():
    hits = {0: np.arange(6), 3: np.arange(4)}
    chosen = [(3, 0), (0, 1), (0, 4), (3, 3), (0, 5)]
    assert expert_sets.matched(chosen, hits, np.random.default_rng(0)) == ((0, 0), (0, 2), (0, 3), (3, 1), (3, 2))


def test_hits_of_a_part_are_its_own():
    """The nearest in one relation are not those of another."""
    hits = {layer: np.zeros((len(PARTS), EXPERTS), dtype=int) for layer in LAYERS}
    lists = {(relation, fold): [(1, 0)] for relation in RELATIONS for fold in (0, 1)}
    for p in range(len(PARTS)):
        hits[1][p] = 100
        hits[1][p, [0, 2 * p + 1, 2 * p + 2]] = 7
    plan, _ = expert_sets.plan(leading(lists), METHOD, PARTS, hits, seeds=5)
    for one in those(plan, control="matched", size=1):
        for p, part in enumerate(PARTS):
            assert one.sets[part][0] in {(1, 2 * p + 1), (1, 2 * p + 2)}


def test_fewer_leading_experts_than_the_size_are_all_blocked():
    lists = LISTS | {("colour", fold): LISTS["colour", fold][:3] for fold in (None, 0, 1)}
    plan, left_out = expert_sets.plan(leading(lists), METHOD, PARTS, HITS, seeds=2)
    for size in (5, 10):
        for one in those(plan, size=size):
            assert all(len(one.sets["colour", fold]) == 3 for fold in (0, 1))  # random ones too
            assert all(len(one.sets["language", fold]) == size for fold in (0, 1))
    assert left_out == []


def test_a_relation_without_leading_experts_has_random_controls_only():
    lists = {key: experts for key, experts in LISTS.items() if key[0] != "colour"}
    plan, left_out = expert_sets.plan(leading(lists), METHOD, PARTS, HITS, seeds=1)
    for one in plan:
        assert {name for name, _ in one.sets} == set(RELATIONS) - ({"colour"} if one.control != "random" else set())
    assert left_out == ["colour, cross-fitted blocking: no expert leads on one of the folds"]


def test_a_relation_with_leading_experts_on_one_fold_is_not_crossfitted():
    lists = {key: experts for key, experts in LISTS.items() if key != ("colour", 1)}
    plan, left_out = expert_sets.plan(leading(lists), METHOD, PARTS, HITS, seeds=1)
    for one in plan:
        assert ("colour" in {name for name, _ in one.sets}) == (not one.folds)
    assert left_out == ["colour, cross-fitted blocking: no expert leads on one of the folds"]


def test_a_method_that_is_not_known_is_named():
    with pytest.raises(SelectionError, match="fame: experts lead by top_neuron_frequency"):
        expert_sets.plan(leading(LISTS), "fame", PARTS, HITS)
    alone, _ = expert_sets.plan(leading({}), METHOD, PARTS, HITS, seeds=2)
    assert [(one.size, one.control, one.seed) for one in alone] == [
        (n, "random", k) for n in (1, 5, 10) for k in (0, 1)
    ]
    assert all(one.sets for one in alone)


def test_a_relation_without_enough_others_has_no_matched_control_in_either_fold():
    """Thirteen of 24 cannot be matched; here, four of six in one fold of one relation."""
    hits = {0: np.ones((len(PARTS), 6), dtype=int), 1: np.ones((len(PARTS), 20), dtype=int)}
    fine = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    lists = {(relation, fold): fine for relation in RELATIONS for fold in (None, 0, 1)}
    lists["language", 1] = [(0, 5), (0, 2), (0, 0), (0, 4), (1, 3)]
    plan, left_out = expert_sets.plan(leading(lists), METHOD, PARTS, hits, seeds=2)
    for one in plan:
        whole = one.control != "matched" or one.size == 1
        assert set(one.sets) == {part for part in PARTS if whole or part[0] != "language"}
    assert left_out == [f"language: top {n}, matched control: too few other experts in a layer" for n in (5, 10)]


def test_nothing_depends_on_the_order_of_rows():
    rows = leading(LISTS)
    shuffled, _ = expert_sets.plan(rows.sample(fraction=1, shuffle=True, seed=3), METHOD, PARTS, HITS, seeds=3)
    assert shuffled == PLAN
    some = PROMPTS.sample(fraction=1, shuffle=True, seed=4)
    names, labels = expert_sets.parts(some)
    assert names == PARTS
    assert [PARTS[label] for label in labels] == [
        (relation, FOLD_OF[group]) for relation, group in some.select("relation", "group").rows()
    ]
    again, _ = expert_sets.plan(rows, METHOD, PARTS, dict(reversed(HITS.items())), seeds=3)
    assert again == PLAN


def test_the_seed_draws_others_and_leaves_the_leading_ones():
    other, _ = expert_sets.plan(leading(LISTS), METHOD, PARTS, HITS, seeds=3, seed=1)
    for mine, its in zip(PLAN, other, strict=True):
        assert (mine == its) == (mine.control == "none") or mine.size == 1
    more, _ = expert_sets.plan(leading(LISTS), METHOD, PARTS, HITS, seeds=5)
    assert [one for one in more if one.seed is None or one.seed < 3] == PLAN


def test_no_controls_may_be_asked_for():
    plan, _ = expert_sets.plan(leading(LISTS), METHOD, PARTS, HITS, seeds=0)
    assert plan == those(PLAN, control="none")
    assert expert_sets.hits_ratio(plan, PARTS, HITS) == {}


def test_hits_ratio_by_hand():
    """10 + 30 slots go to the blocked ones, 5 + 8 and 10 + 2 to their controls."""
    hits = {1: np.array([[10, 5, 10, 0], [1, 30, 8, 2]]), 2: np.zeros((2, 4), dtype=int)}
    parts = [("capital", 0), ("capital", 1)]
    plan = [
        Blocked(1, "none", False, None, dict.fromkeys(parts, ((1, 0),))),
        Blocked(1, "none", True, None, {parts[0]: ((1, 0),), parts[1]: ((1, 1),)}),
        Blocked(1, "random", False, 0, dict.fromkeys(parts, ((1, 0),))),
        Blocked(1, "matched", True, 0, {parts[0]: ((1, 1),), parts[1]: ((1, 2),)}),
        Blocked(1, "matched", True, 1, {parts[0]: ((1, 2),), parts[1]: ((1, 3),)}),
        Blocked(5, "none", True, None, {parts[0]: ((1, 0), (2, 1))}),
        Blocked(5, "matched", True, 0, {parts[0]: ((1, 3), (2, 2))}),
    ]
    assert expert_sets.hits_ratio(plan, parts, hits) == {1: pytest.approx(40 / 12.5)}, "controls of 5 are never chosen"
    assert expert_sets.hits_ratio([], parts, hits) == {}


def test_hits_ratio_compares_what_has_a_control():
    """A relation without matched controls does not count on either side."""
    hits = {1: np.array([[10, 5, 0, 0], [900, 0, 0, 0]])}
    parts = [("capital", 0), ("language", 0)]
    plan = [
        Blocked(1, "none", True, None, dict.fromkeys(parts, ((1, 0),))),
        Blocked(1, "matched", True, 0, {parts[0]: ((1, 1),)}),
    ]
    assert expert_sets.hits_ratio(plan, parts, hits) == {1: pytest.approx(2.0)}


def test_matched_controls_keep_the_hits_in_balance():
    ratio = expert_sets.hits_ratio(PLAN, PARTS, HITS)
    by_hand = {}
    for size in (1, 5, 10):
        sums = {"none": [], "matched": []}
        for one, (p, part) in itertools.product(PLAN, enumerate(PARTS)):
            if one.folds and one.size == size:
                sums[one.control].append(sum(int(HITS[layer][p, e]) for layer, e in one.sets[part]))
        by_hand[size] = np.mean(sums["none"]) / np.mean(sums["matched"])
    assert ratio == pytest.approx(by_hand)
    assert all(0.8 < value < 1.25 for value in ratio.values())
