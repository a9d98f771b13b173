"""Leading experts against loops over prompts, their overlaps against enumeration of all lists there could be."""

import math
from collections import Counter
from itertools import combinations, product

import numpy as np
import polars as pl
import pytest

from moescope import expert_importance as importance_module
from moescope import tables
from moescope.expert_importance import (
    METHODS,
    ImportanceError,
    expert_importance,
    expert_overlap,
    leading_neurons,
    read_published,
)
from tests.examples import ROOT

FILE = ROOT / "resources" / "published" / "top_experts.csv"
#: Experts by routing layer, neurons of each, and experts per prompt and layer; layer 0 is dense.
EXPERTS, WIDTH, ROUTED = {1: 7, 2: 9}, 30, 2


def prompt_table(facts):
    """(relation, group), one subject each."""
    rows = [(f"{r}/{i:03d}", r, "x", f"s{i}", "o", "{} is", "s is", g) for i, (r, g) in enumerate(facts)]
    return tables.check(pl.DataFrame(rows, schema=list(tables.SCHEMAS["prompts"].columns), orient="row"), "prompts")


FACTS = prompt_table([("abc"[i % 7 % 3], i * 3 % 10) for i in range(36)])


def routing_table(prompts, used, weight=None, lpi=None, experts=EXPERTS):
    """The routing of prompts: ``used(i)`` the (layer, expert) in the order of their slots."""
    rows = []
    for i, name in enumerate(prompts["prompt_id"]):
        for layer, number in experts.items():
            slots = [one for one in used(i) if one[0] == layer]
            for expert in range(number):
                one = (layer, expert)
                slot = slots.index(one) if one in slots else None
                numbers = (weight(i, one) if weight and slot is not None else 0.0, 0.1, lpi(i, one) if lpi else 0.0)
                rows.append((name, layer, expert, slot, *numbers))
    return tables.of_rows(rows, "routing")


def listed(prompts, neurons):
    """top_active of FFN neurons, ``neurons(i)``: (layer, kind, expert, neuron, lpi)."""
    rows = [
        (name, "ffn", *one[:3], None, *one[3:]) for i, name in enumerate(prompts["prompt_id"]) for one in neurons(i)
    ]
    return tables.of_rows(rows, "top_active")


class Made:
    """A random model whose scores are few multiples of 1/64, so that ties are many and sums exact."""

    def __init__(self, seed, prompts=FACTS):
        random = np.random.default_rng(seed)
        self.prompts = prompts
        self.used, self.weights, self.neurons = [], [], []
        for _ in range(len(prompts)):
            chosen = [(layer, int(e)) for layer, n in EXPERTS.items() for e in random.permutation(n)[:ROUTED]]
            self.used.append(chosen)
            self.weights.append({one: int(random.integers(1, 8)) / 8 for one in chosen})
            ids = [(0, "dense", None, n) for n in range(20)] + [(1, "shared", None, n) for n in range(25)]
            ids += [(layer, "routed", e, n) for layer, e in chosen for n in range(WIDTH)]
            self.neurons.append([(*one, int(random.integers(-9, 9)) / 64) for one in ids])

    def lpi(self, i, one):
        return sum(n[4] for n in self.neurons[i] if (n[0], n[2]) == one and n[1] == "routed")

    def frames(self):
        routing = routing_table(self.prompts, self.used.__getitem__, lambda i, e: self.weights[i][e], self.lpi)
        mine = listed(self.prompts, self.neurons.__getitem__)
        names = self.prompts["prompt_id"]
        attention = [(name, "attn", 1, None, None, h, n, 9.0) for name in names for h in range(2) for n in range(90)]
        return routing, pl.concat([mine, tables.of_rows(attention, "top_active")])

    def hundred(self, i):
        order = ("dense", "routed", "shared")
        ranked = sorted(self.neurons[i], key=lambda n: (-n[4], n[0], order.index(n[1]), n[2] or 0, n[3]))
        return ranked[:100]

    def expected(self):
        """Every row of the table, by loops over the prompts."""
        experts = [(layer, e) for layer, n in EXPERTS.items() for e in range(n)]
        rows = []
        for relation, fold in product(sorted(set(self.prompts["relation"])), (None, 0, 1)):
            mine = [
                i
                for i, (r, g) in enumerate(self.prompts.select("relation", "group").iter_rows())
                if r == relation and (fold is None or g // 5 != fold)
            ]
            if not mine:
                continue
            found = {method: dict.fromkeys(experts, 0.0) for method in METHODS}
            for i in mine:
                owners = Counter((n[0], n[2]) for n in self.hundred(i) if n[1] == "routed")
                for one in experts:
                    found["top_neuron_frequency"][one] += one in owners
                    found["top_neuron_count"][one] += owners[one]
                    found["routing_frequency"][one] += (one in self.used[i]) / len(mine)
                    found["mean_weight"][one] += self.weights[i].get(one, 0) / len(mine)
                    found["summed_lpi"][one] += self.lpi(i, one) / len(mine)
            for method, values in found.items():
                exact = {one: round(value, 12) for one, value in values.items()}
                total = {one: sum(self.lpi(i, one) for i in mine) for one in experts}
                best = sorted(experts, key=lambda e, v=exact, t=total: (-v[e], -t[e], e))[:10]
                best = [one for one in best if exact[one] > 0]
                rows += [(relation, method, fold, k, *one, exact[one]) for k, one in enumerate(best, start=1)]
        return tables.of_rows(rows, "expert_importance")


def equal(one, other):
    ids = [name for name in one.columns if name != "importance"]
    assert one.select(ids).equals(other.select(ids))
    assert one["importance"].to_numpy() == pytest.approx(other["importance"].to_numpy(), abs=1e-9)


def leaders(table, relation="a", method="top_neuron_frequency", fold=None):
    """(layer, expert): importance, in the order of the ranks."""
    rows = table.filter(pl.col("fold").eq_missing(pl.lit(fold)), relation=relation, method=method).sort("rank")
    assert rows["rank"].to_list() == list(range(1, len(rows) + 1))
    return {(layer, e): value for layer, e, value in rows.select("layer", "expert", "importance").iter_rows()}


@pytest.mark.parametrize("seed", range(3))
def test_every_method_and_fold_against_loops_over_prompts(seed):
    made = Made(seed)
    routing, top_active = made.frames()
    found = expert_importance(routing, top_active, made.prompts)
    equal(found, made.expected())
    assert found["method"].unique().sort().to_list() == sorted(METHODS)
    frequency = found.filter(pl.col("method") == "top_neuron_frequency", pl.col("fold").is_null())
    # the scores are made to tie, or the rule for ties would not have been tested
    assert frequency.select("relation", "importance").is_duplicated().any()


def test_the_order_of_rows_changes_nothing():
    made = Made(5)
    routing, top_active = made.frames()
    straight = expert_importance(routing, top_active, made.prompts)
    mixed = (one.sample(fraction=1, shuffle=True, seed=4) for one in (routing, top_active, made.prompts))
    assert expert_importance(*mixed).equals(straight)


def test_only_the_hundred_highest_count_and_shared_neurons_compete_for_them():
    prompts = prompt_table([("a", 0), ("a", 6)])
    used = lambda i: [(1, 0), (2, 0)]  # noqa: E731
    routing = routing_table(prompts, used, lambda i, e: 0.5, lambda i, e: 1.0)

    def neurons(shared):
        rows = [(1, "shared", None, n, 2.0) for n in range(shared)]
        rows += [(1, "routed", 0, n, 1.0) for n in range(3)]
        return rows + [(2, "routed", 0, n, 0.5) for n in range(200)]

    everything = expert_importance(routing, listed(prompts, lambda i: neurons(100)), prompts)
    assert leaders(everything, method="routing_frequency") == {(1, 0): 1, (2, 0): 1}
    assert leaders(everything) == leaders(everything, method="top_neuron_count") == {}
    some = expert_importance(routing, listed(prompts, lambda i: neurons(97 + i)), prompts)
    assert leaders(some) == {(1, 0): 2}
    assert leaders(some, method="top_neuron_count") == {(1, 0): 3 + 2}
    few = expert_importance(routing, listed(prompts, lambda i: neurons(0)[: 4 + i]), prompts)
    assert leaders(few, method="top_neuron_count") == {(1, 0): 6, (2, 0): 3}  # fewer than 100 active: all of them


def test_ties_go_to_the_larger_lpi_then_to_the_earlier_layer_and_expert():
    prompts = prompt_table([("a", 0)] * 2)
    used = lambda i: [(1, 0), (1, 1), (2, 0), (2, 1)]  # noqa: E731
    lpi = {(1, 0): 0.1, (1, 1): 0.1, (2, 0): 0.1, (2, 1): 0.2}
    routing = routing_table(prompts, used, lambda i, e: 0.25, lambda i, e: lpi.get(e, 0.0))
    tops = listed(prompts, lambda i: [(*one[:1], "routed", one[1], 0, 1.0) for one in used(i)])
    found = expert_importance(routing, tops, prompts)
    for method in METHODS:
        assert list(leaders(found, method=method)) == [(2, 1), (1, 0), (1, 1), (2, 0)]
    assert leaders(found, method="mean_weight")[2, 1] == 0.25
    # of 102 equal neurons the first hundred by layer and number count
    many = listed(prompts, lambda i: [(layer, "routed", 0, n, 1.0) for layer in (2, 1) for n in range(51)])
    assert leaders(expert_importance(routing, many, prompts), method="top_neuron_count") == {(1, 0): 102, (2, 0): 98}
    assert leading_neurons(many, 100)["rank"].to_list() == 2 * list(range(1, 101))


def test_only_experts_with_a_positive_importance_are_listed_and_ten_of_them_at_most():
    prompts = prompt_table([("a", 0), ("a", 7)])
    everyone = [(layer, e) for layer, n in EXPERTS.items() for e in range(n)]
    lpi = lambda i, e: 0.1 * (e[1] - 6) if e[0] == 2 else -0.5 + i  # noqa: E731
    routing = routing_table(prompts, lambda i: everyone, lambda i, e: 0.5, lpi)
    tops = listed(prompts, lambda i: [(*one[:1], "routed", one[1], 0, 1.0) for one in everyone])
    found = expert_importance(routing, tops, prompts)
    # experts 7 and 8 of layer 2 gain; 6 gives nothing, those of layer 1 lose in one prompt what they gain in the other
    assert leaders(found, method="summed_lpi") == {(2, 8): pytest.approx(0.2), (2, 7): pytest.approx(0.1)}
    assert len(leaders(found)) == len(leaders(found, method="routing_frequency")) == 10


def test_a_fold_is_tested_with_what_was_found_on_the_other():
    prompts = prompt_table([("a", 0), ("a", 4), ("a", 5), ("a", 9), ("b", 2)])
    used = lambda i: [(1, 0 if prompts["group"][i] < 5 else 3)]  # noqa: E731
    routing = routing_table(prompts, used, lambda i, e: 1.0, lambda i, e: 1.0 if e in used(i) else 0.0)
    tops = listed(prompts, lambda i: [(1, "routed", used(i)[0][1], 0, 1.0)])
    found = expert_importance(routing, tops, prompts)
    for method, value in zip(METHODS, (2, 2, 1, 1, 1), strict=True):
        assert leaders(found, method=method, fold=1) == {(1, 0): value}  # leads in groups 0 to 4 alone
        assert leaders(found, method=method, fold=0) == {(1, 3): value}
        assert leaders(found, method=method).keys() == {(1, 0), (1, 3)}
        assert leaders(found, "b", method, 1).keys() == {(1, 0)}
        assert leaders(found, "b", method, 0) == {}  # b has no prompts in the other fold


def test_torn_tables_are_refused():
    made = Made(1)
    routing, top_active = made.frames()
    first = made.prompts["prompt_id"][0]
    cases = [
        ((routing[:-1], top_active), "routing does not hold every expert"),
        ((routing.filter(pl.col("prompt_id") != first), top_active), "routing does not hold every expert"),
        ((routing, top_active.filter(pl.col("prompt_id") != first)), "top_active does not hold the prompts"),
        ((routing.filter(pl.col("layer") == 1), top_active), "experts that routing does not know"),
        ((routing.with_columns(slot=pl.lit(None, pl.Int32)), top_active), "to which the prompt is not routed"),
    ]
    for frames, message in cases:
        with pytest.raises(ImportanceError, match=f"{message}.*; delete"):
            expert_importance(*frames, made.prompts)
    with pytest.raises(ImportanceError, match="routing does not hold"):
        expert_importance(routing, top_active, made.prompts[1:])


# Overlap of lists ---------------------------------------------------------------------------------------------------


def importances(lists, relation="a"):
    """expert_importance from the list of every method, [(layer, expert)]; what else it holds must not count."""
    rows = [(relation, method, None, k, *one, 1.0) for method, of in lists.items() for k, one in enumerate(of, start=1)]
    rows += [(relation, method, 0, k, 2, k, 1.0) for method in METHODS for k in range(1, 9)]
    return tables.of_rows(rows, "expert_importance")


def paper(experts, relation="a"):
    rows = [(relation, "m", k, *one) for k, one in enumerate(experts, start=1)]
    return pl.DataFrame(rows, schema=["relation", "model", "rank", "layer", "expert"], orient="row")


def row(table, method, other, relation="a"):
    rows = table.filter(relation=relation, method=method, other=other)
    assert len(rows) == 1
    return rows.row(0, named=True)


def test_overlaps_by_hand():
    lists = {
        METHODS[0]: [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 7), (2, 8)],  # the sixth and seventh do not count
        METHODS[1]: [(1, 0), (2, 7), (2, 8)],
        METHODS[2]: [(2, 2), (2, 1), (2, 0), (1, 1), (1, 0)],
        METHODS[3]: [(2, 8)],
    }
    table = expert_overlap(importances(lists), paper([(1, 0), (2, 5), (1, 0)]), EXPERTS, 7)
    assert table.select("method", "other").rows() == sorted(combinations((*METHODS, "published"), 2))
    first = row(table, METHODS[0], METHODS[1])
    assert (first["step"], first["size"], first["other_size"], first["common"]) == (7, 5, 3, 1)
    assert first["chance"] == pytest.approx(5 * 3 / 16)
    assert first["chance_given_layers"] == pytest.approx(2 * 1 / 7 + 3 * 2 / 9)
    assert row(table, METHODS[0], METHODS[2])["common"] == 5
    beside = row(table, METHODS[0], "published")
    assert (beside["size"], beside["other_size"], beside["common"]) == (5, 2, 1)  # the repeated expert counts once
    assert row(table, METHODS[3], "published")["p"] == 1
    none = row(table, METHODS[4], "published")  # no expert has a positive summed LPI
    assert (none["size"], none["common"], none["chance"], none["p"]) == (0, 0, 0, 1)
    for nothing in (None, paper([]), paper([(1, 0)], "b")):
        assert "published" not in expert_overlap(importances(lists), nothing, EXPERTS, None)["other"]


def test_chance_and_p_against_all_lists_there_could_be():
    experts = {0: 3, 3: 4, 4: 2}
    everyone = [(layer, e) for layer, n in experts.items() for e in range(n)]
    a, b = [(0, 0), (3, 1), (3, 2), (4, 0)], [(0, 0), (3, 0), (3, 1), (3, 2)]
    found = row(expert_overlap(importances({METHODS[0]: a}), paper(b), experts, None), METHODS[0], "published")
    common = [len({*a} & {*other}) for other in combinations(everyone, len(b))]
    assert found["chance"] == pytest.approx(np.mean(common))
    dealt = [
        len({*a} & {*other})
        for other in combinations(everyone, len(b))
        if Counter(layer for layer, _ in other) == Counter(layer for layer, _ in b)
    ]
    assert found["chance_given_layers"] == pytest.approx(np.mean(dealt))
    assert found["p"] == pytest.approx(np.mean([n >= found["common"] for n in dealt]))
    late = expert_overlap(importances({METHODS[0]: [(1, 0), (1, 1)]}), paper([(1, 1), (1, 2)]), {0: 4, 1: 4}, None)
    assert row(late, METHODS[0], "published")["p"] == pytest.approx(5 / 6)  # of all eight experts it would be 13 / 28


def test_random_lists_overlap_as_chance_has_it():
    """Lists that lie in late layers overlap more than all experts would let them, and just as layers let them."""
    random = np.random.default_rng(3)
    relations = [f"r{i:03d}" for i in range(300)]
    draw = lambda: [(2, int(e)) for e in random.permutation(9)[:4]] + [(1, int(random.integers(7)))]  # noqa: E731
    ours = pl.concat(importances({METHODS[0]: draw()}, name) for name in relations)
    table = expert_overlap(ours, pl.concat(paper(draw(), name) for name in relations), EXPERTS, 0)
    table = table.filter(method=METHODS[0], other="published")
    error = table["common"].std() / math.sqrt(len(table))
    assert table["common"].mean() == pytest.approx(table["chance_given_layers"].mean(), abs=3.5 * error)
    assert table["common"].mean() > table["chance"].mean() + 3.5 * error
    everyone = [(layer, e) for layer, n in EXPERTS.items() for e in range(n)]
    free = lambda: [everyone[i] for i in random.permutation(16)[:5]]  # noqa: E731
    ours = pl.concat(importances({METHODS[0]: free()}, name) for name in relations)
    table = expert_overlap(ours, pl.concat(paper(free(), name) for name in relations), EXPERTS, 0)
    table = table.filter(method=METHODS[0], other="published")
    assert table["common"].mean() == pytest.approx(table["chance"].mean(), abs=3.5 * error)
    for level in (0.05, 0.2, 0.5):
        assert (table["p"] <= level).mean() <= level + 3.5 * math.sqrt(level / len(table))


def test_lists_of_another_model_are_refused():
    lists = importances({METHODS[0]: [(1, 0)]})
    for stranger in ((1, 7), (0, 0), (2, -1)):
        with pytest.raises(ImportanceError, match=r"main: the published list of a names expert .*; take the lists"):
            expert_overlap(lists, paper([stranger]), EXPERTS, None)
    with pytest.raises(ImportanceError, match="the top_neuron_frequency list of a"):
        expert_overlap(lists, None, {2: 9}, None)


def test_the_lists_of_the_paper():
    lists = read_published(FILE)
    assert lists.columns == ["relation", "model", "rank", "layer", "expert"]
    assert len(lists) == 12 * 3 * 5
    qwen = lists.filter(model="Qwen1.5-MoE-A2.7B")
    assert qwen.filter(relation="country_capital_city").sort("rank")["expert"].to_list() == [59, 48, 1, 14, 38]
    # one list of the paper repeats an expert
    once = qwen.unique(["relation", "layer", "expert"]).group_by("relation").len().filter(pl.col("len") < 5)
    assert once.rows() == [("object_superclass", 4)]
    sizes = {"Qwen1.5-MoE-A2.7B": (24, 60), "OLMoE-1B-7B": (16, 64), "Mixtral-8x7B": (32, 8)}
    for model, (layers, experts) in sizes.items():
        theirs = lists.filter(model=model)
        ours = pl.concat(importances({METHODS[0]: [(3, 1)]}, name) for name in theirs["relation"].unique())
        table = expert_overlap(ours, theirs, dict.fromkeys(range(layers), experts), None)
        assert table.filter(other="published")["relation"].n_unique() == 12


def test_a_damaged_file_of_lists_is_refused(tmp_path):
    head, *rows = FILE.read_text(encoding="utf-8").splitlines()
    cases = {
        "columns": (head.replace("rank", "place"), rows),
        "conversion": (head, [rows[0].replace(",1,", ",first,"), *rows[1:]]),
        "column expert has an empty cell": (head, [rows[0].rsplit(",", 1)[0] + ",", *rows[1:]]),
    }
    for message, (first, rest) in cases.items():
        path = tmp_path / "top_experts.csv"
        path.write_text("\n".join([first, *rest]), encoding="utf-8")
        with pytest.raises(ImportanceError, match=f"{message}.*; restore the file"):
            read_published(path)
    with pytest.raises(ImportanceError, match="; restore the file"):
        read_published(tmp_path / "nowhere.csv")


def test_the_sizes_of_the_study():
    assert (importance_module.TOP_NEURONS, importance_module.LISTED, importance_module.COMPARED) == (100, 10, 5)
