"""Kinds and overlaps of leading neurons, against loops over prompts and pairs, and against random sets."""

import math
from itertools import combinations

import numpy as np
import polars as pl
import pytest

from moescope import tables
from moescope.neuron_types import TOPS, NeuronTypesError, neuron_overlap, neuron_types, shared_neurons
from moescope.sample import SampleError
from moescope.statistics import SubjectBootstrap
from tests.unit.neuron_tables import Model, prompt_table, random_routing

#: 50 dense neurons in layer 0, then 6 experts of 50 and 70 shared neurons in layers 1 and 2; 390 active of 790.
MODEL = Model(layers=3, experts=6, width=50, shared=70, dense=(0,))
PROMPTS = prompt_table(24)
ACTIVE = {"dense": 50, "routed": 200, "shared": 140}
ALL = {"dense": 50, "routed": 600, "shared": 140}


class Made:
    """A model with random LPI, its tables and, by prompt, which neurons lead."""

    def __init__(self, seed, prompts=PROMPTS, model=MODEL, slots=2, steps=None, lpi=None, routed=None):
        """``lpi`` [prompts, neurons] and ``routed`` [prompts, layers, slots] are random where they are not given."""
        random = np.random.default_rng(seed)
        self.prompts, self.model, self.ids = prompts, model, model.ffn
        # the order of the key, by which ties are broken
        assert self.ids.equals(self.ids.sort("layer", "kind", "expert", "neuron", nulls_last=True))
        self.kind = self.ids["kind"].to_numpy()
        self.routed = random_routing(random, len(prompts), model, slots) if routed is None else routed
        self.active = model.active(self.routed, len(prompts))
        lpi = random.normal(size=self.active.shape) if lpi is None else lpi
        lpi = np.round(lpi * steps) / steps if steps else lpi
        self.lpi = np.where(self.active, lpi, 0).astype(np.float32).astype(np.float64)
        table = model.checkpoint(3, prompts, self.lpi, routed=self.routed).table
        names = ("top_active", "ffn_neurons", "active_sums", "routing")
        self.frames = {name: table(name, pl.selectors.all()) for name in names}
        relation = prompts["relation"].to_numpy()
        active = {f"active_{r}": pl.Series(self.active[relation == r].sum(axis=0)) for r in sorted(set(relation))}
        self.frames["ffn_neurons"] = tables.check(self.frames["ffn_neurons"].with_columns(**active), "ffn_neurons")

    def types(self, **changed):
        frames = {**self.frames, **changed}
        prompts = changed.get("prompts", self.prompts)
        return neuron_types(3, frames["top_active"], frames["ffn_neurons"], frames["active_sums"], prompts)

    def overlap(self, **changed):
        frames = {**self.frames, **changed}
        prompts = changed.get("prompts", self.prompts)
        return neuron_overlap(3, frames["top_active"], frames["ffn_neurons"], frames["routing"], prompts)

    def leading(self, values, able, number):
        """The neurons with the largest values, of those that are able."""
        ranked = sorted((int(n) for n in np.flatnonzero(able)), key=lambda n: (-values[n], n))
        return ranked[:number]

    def of_prompt(self, i, number):
        return self.leading(self.lpi[i], self.active[i], number)

    def of_relation(self, name, number):
        mine = [i for i, r in enumerate(self.prompts["relation"]) if name in (None, r)]
        column = "importance" if name is None else f"importance_{name}"
        stored = self.frames["ffn_neurons"][column].to_numpy()
        assert stored == pytest.approx(self.lpi[mine].mean(axis=0), abs=1e-6)
        return self.leading(stored, self.active[mine].any(axis=0), number)


def cell(table, **keys):
    rows = table.filter(*(pl.col(key).eq_missing(pl.lit(value)) for key, value in keys.items()))
    assert len(rows) == 1, rows
    return rows.row(0, named=True)


def weights(prompts):
    """How often every prompt occurs in the sample and in the draws, [1 + draws, prompts]."""
    bootstrap = SubjectBootstrap.draw(prompts["subject"])
    return bootstrap.counts[:, [bootstrap.subjects.index(s) for s in prompts["subject"]]]


# Types --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "steps"), [(0, None), (1, 2)])
def test_types_against_loops_over_prompts(seed, steps):
    """With ``steps`` the scores are multiples of a half: at every edge there are ties."""
    made = Made(seed, steps=steps)
    table = made.types()
    weight = weights(PROMPTS)
    scopes = [("all", None), *(("relation", name) for name in ("r0", "r1", "r2"))]
    assert len(table) == 3 * 2 * 4 * 3
    for scope, name in scopes:
        mine = [i for i, r in enumerate(PROMPTS["relation"]) if name in (None, r)]
        for top in TOPS:
            leaders = [made.kind[made.of_prompt(i, top)].tolist() for i in mine]
            best = made.kind[made.of_relation(name, top)].tolist()
            for kind in ("dense", "routed", "shared"):
                keys = {"top": top, "scope": scope, "name": name, "kind": kind}
                share = np.array([one.count(kind) / top for one in leaders])
                found = cell(table, ranking="per_prompt", **keys)
                assert found["value"] == pytest.approx(share.mean())
                with np.errstate(invalid="ignore"):
                    drawn = weight[1:, mine] @ share / weight[1:, mine].sum(axis=1)
                assert [found["low"], found["high"]] == pytest.approx(np.nanpercentile(drawn, [2.5, 97.5]))
                whole = cell(table, ranking="aggregate", **keys)
                assert whole["value"] == pytest.approx(best.count(kind) / top)
                assert (whole["low"], whole["high"]) == (None, None)
                for one in (found, whole):
                    chances = (of[kind] / sum(of.values()) for of in (ACTIVE, ALL))
                    expected = [pytest.approx(chance) if one is found else None for chance in chances]
                    assert [one["chance_active"], one["chance_all"]] == expected
                    assert one["step"] == 3
    sums = table.group_by("top", "ranking", "scope", "name").agg(pl.col("value", "chance_active", "chance_all").sum())
    assert sums["value"].to_numpy() == pytest.approx(1)
    chances = sums.filter(ranking="per_prompt").select("chance_active", "chance_all")
    assert chances.to_numpy() == pytest.approx(1)


def test_without_structure_the_shares_are_those_of_the_active_neurons():
    """Not those of all neurons, of which three quarters are routed."""
    prompts = prompt_table(200)
    table = Made(4, prompts).types().filter(ranking="per_prompt", scope="all")
    for one in table.iter_rows(named=True):
        assert one["low"] - 0.003 < one["chance_active"] < one["high"] + 0.003
    routed = cell(table, top=100, kind="routed")
    assert routed["high"] < routed["chance_all"] - 0.1


def test_kinds_by_hand_where_shared_neurons_win():
    """Shared neurons stand above all others: 140 of them; then the routed ones, of which 200 are active."""
    rank = {"shared": 3.0, "routed": 2.0, "dense": 1.0}
    lpi = np.tile([rank[kind] for kind in MODEL.ffn["kind"]], (len(PROMPTS), 1))
    turns = np.tile(np.array([[0, 1], [2, 3], [4, 5]])[:, None], (len(PROMPTS) // 3, MODEL.layers, 1))
    made = Made(2, lpi=lpi, routed=turns)
    shares = {(row["top"], row["kind"]): row["value"] for row in made.types().filter(scope="all").to_dicts()}
    per_prompt = made.types().filter(ranking="per_prompt")
    for top, shared in ((100, 1.0), (200, 0.7), (300, 140 / 300)):
        for name in (None, "r0", "r1", "r2"):
            assert cell(per_prompt, top=top, name=name, kind="shared")["value"] == pytest.approx(shared)
            assert cell(per_prompt, top=top, name=name, kind="routed")["value"] == pytest.approx(1 - shared)
    assert shares[100, "dense"] == 0
    # over prompts a routed neuron, active in every third, has 2 / 3 on average: the 50 dense ones overtake it
    aggregate = made.types().filter(ranking="aggregate", scope="all", top=200)
    assert dict(aggregate.select("kind", "value").iter_rows()) == {"dense": 0.25, "routed": 0.05, "shared": 0.7}


def test_fewer_active_neurons_than_are_asked_for_all_count():
    """52 are active of 100 in a prompt; 16 of the routed ones are so in no prompt and count in no ranking."""
    model = Model(layers=1, experts=5, width=16, shared=20)
    prompts = prompt_table(6)
    routed = np.tile(np.array([[[0, 1]], [[2, 3]]]), (3, 1, 1))
    made = Made(0, prompts, model, lpi=np.ones((6, 100)), routed=routed)
    assert (made.active.sum(axis=1) == 52).all()
    found = made.types()
    for top in TOPS:
        every = cell(found, top=top, ranking="per_prompt", scope="all", kind="shared")
        assert every["value"] == pytest.approx(20 / 52)
        assert every["chance_active"] == pytest.approx(20 / 52)
        assert every["chance_all"] == pytest.approx(0.2)
        whole = cell(found, top=top, ranking="aggregate", scope="all", kind="shared")
        assert whole["value"] == pytest.approx(20 / 84)
        lonely = cell(found, top=top, ranking="aggregate", name="r1", kind="shared")  # of one prompt
        assert lonely["value"] == pytest.approx(20 / 52)


def test_one_subject_has_no_interval():
    prompts = PROMPTS.with_columns(subject=pl.lit("s"))
    assert Made(0, prompts).types()["low"].is_null().all()
    assert Made(0, prompts).overlap()["low"].is_null().all()


# Shared neurons -----------------------------------------------------------------------------------------------------


def neurons(shared, routed=(0.0,)):
    """ffn_neurons of one relation a: shared (layer, neuron): importance, and routed neurons of one expert."""
    rows = [(layer, "shared", None, n, 1, 1.0, value, value, 1) for (layer, n), value in shared.items()]
    rows += [(1, "routed", 0, n, 1, 1.0, value, value, 1) for n, value in enumerate(routed)]
    columns = ["layer", "kind", "expert", "neuron", "active", "magnitude", "importance", "importance_a", "active_a"]
    return tables.check(pl.DataFrame(rows, schema=columns, orient="row"), "ffn_neurons")


def test_shared_neurons_by_hand():
    shared = {(2, 7): 0.5, (1, 9): 0.5, (1, 3): 0.25, (2, 0): 0.75, (1, 0): 1e-8, (1, 1): -1.0, (2, 8): 0.125}
    table = shared_neurons(None, neurons(shared, routed=(9.0,)), ["a"], 4)
    listed = {
        within: table.filter(within=within).sort("rank").select("rank", "layer", "neuron", "importance").rows()
        for within in ("all", "first_I")
    }
    assert listed["all"] == [(1, 2, 0, 0.75), (2, 1, 9, 0.5), (3, 2, 7, 0.5), (4, 1, 3, 0.25), (5, 2, 8, 0.125)]
    assert listed["first_I"] == [(1, 2, 0, 0.75), (2, 1, 3, 0.25)]
    assert shared_neurons(7, neurons(shared), ["a"], None).equals(
        table.filter(within="all").with_columns(step=pl.lit(7, pl.Int64))
    )
    many = {(layer, n): 1.0 for layer in (2, 1) for n in range(9)}
    best = shared_neurons(7, neurons(many), ["a"], 3).filter(within="first_I")
    assert best.select("layer", "neuron").rows() == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]


def test_shared_neurons_against_loops():
    made = Made(6)
    table = shared_neurons(3, made.frames["ffn_neurons"], ["r2", "r0"], 50)
    assert len(table) == 2 * 2 * 5
    for relation in ("r0", "r2"):
        values = made.frames["ffn_neurons"][f"importance_{relation}"].to_numpy()
        for within, width in (("all", 70), ("first_I", 50)):
            able = (made.kind == "shared") & (made.ids["neuron"] < width).to_numpy()
            best = [made.ids.select("layer", "neuron").row(n) for n in made.leading(values, able, 5)]
            mine = table.filter(relation=relation, within=within)
            assert mine.select("layer", "neuron").rows() == best


# Overlap ------------------------------------------------------------------------------------------------------------


def jaccard(a, b):
    return len(a & b) / len(a | b)


def expected_jaccard(common, a, b):
    return common / (len(a) + len(b) - common)


def pairs_of(made, kind):
    """(i, j, J, chance) of every pair of prompts of different subjects that has members of the kind."""
    inside = {n for n, k in enumerate(made.kind) if kind in ("all", k)}
    sets = [inside & {*made.of_prompt(i, 100)} for i in range(len(made.prompts))]
    active = [inside & {*np.flatnonzero(one).tolist()} for one in made.active]
    subject = made.prompts["subject"].to_list()
    for i, j in combinations(range(len(sets)), 2):
        a, b = sets[i], sets[j]
        if subject[i] != subject[j] and a | b:
            common = len(a) * len(b) * len(active[i] & active[j]) / (len(active[i]) * len(active[j]))
            yield i, j, jaccard(a, b), expected_jaccard(common, a, b)


@pytest.mark.parametrize("kind", ["all", "shared", "routed"])
@pytest.mark.parametrize(("seed", "steps"), [(0, None), (1, 2)])
def test_overlaps_of_prompts_against_loops_over_pairs(kind, seed, steps):
    made = Made(seed, steps=steps)
    table = made.overlap()
    relation, weight = PROMPTS["relation"].to_list(), weights(PROMPTS)
    found = list(pairs_of(made, kind))
    scopes = [("samples", name) for name in ("r0", "r1", "r2")] + [("strangers", None)]
    for comparison, name in scopes:
        mine = [
            p for p in found if (relation[p[0]], relation[p[1]]) == (name, name)
            or (name is None and relation[p[0]] != relation[p[1]])
        ]  # fmt: skip
        one, other, value, chance = (np.array(column) for column in zip(*mine, strict=True))
        row = cell(table, kind=kind, comparison=comparison, relation=name, other=None)
        assert row["value"] == pytest.approx(value.mean())
        assert row["chance"] == pytest.approx(chance.mean())
        both = weight[:, one] * weight[:, other]
        with np.errstate(invalid="ignore"):
            drawn = both @ value / both.sum(axis=1)
        assert drawn[0] == pytest.approx(row["value"])
        assert [row["low"], row["high"]] == pytest.approx(np.nanpercentile(drawn[1:], [2.5, 97.5]))
        assert row["low"] < row["value"] < row["high"]


def test_overlaps_of_relations_against_sets():
    made = Made(3, steps=4)
    table = made.overlap()
    for kind in ("all", "shared", "routed"):
        inside = {n for n, k in enumerate(made.kind) if kind in ("all", k)}
        sets = {name: inside & {*made.of_relation(name, 100)} for name in ("r0", "r1", "r2")}
        for one, other in combinations(sets, 2):
            a, b = sets[one], sets[other]
            row = cell(table, kind=kind, comparison="relations", relation=one, other=other)
            assert row["value"] == pytest.approx(jaccard(a, b))
            assert row["chance"] == pytest.approx(expected_jaccard(len(a) * len(b) / len(inside), a, b))
            assert (row["low"], row["high"], row["step"]) == (None, None, 3)
    assert len(table) == 3 * (3 + 3 + 1)


@pytest.mark.parametrize("kind", ["all", "shared", "routed"])
def test_without_structure_the_overlap_is_that_of_chance(kind):
    """Experts are dealt unequally, so that a chance that knows nothing of routing would not do."""
    often = np.random.default_rng(8).random((90, MODEL.layers, MODEL.experts)) * [1, 1, 2, 3, 5, 8]
    made = Made(8, prompt_table(90), routed=np.argsort(often)[..., :2])
    table = made.overlap()
    relation = made.prompts["relation"].to_list()
    for name in ("r0", "r2", None):
        comparison = "strangers" if name is None else "samples"
        row = cell(table, kind=kind, comparison=comparison, relation=name)
        # J is convex in what is in common: the mean of J lies a little above J of the mean
        assert row["low"] - 0.002 < row["chance"] < row["high"]
        assert row["value"] == pytest.approx(row["chance"], rel=0.08)
    assert {relation.count(name) for name in ("r0", "r2")} == {18, 54}


def test_chance_of_prompts_by_simulation():
    """Members drawn at random among the neurons active in their prompt have so much in common on average."""
    random, made = np.random.default_rng(1), Made(9)
    for kind in ("all", "routed"):
        inside = (made.kind == kind) | (kind == "all")
        found = list(pairs_of(made, kind))[:3]
        for i, j, _, chance in found:
            sizes = [int(inside[made.of_prompt(k, 100)].sum()) for k in (i, j)]
            able = [np.flatnonzero(made.active[k] & inside) for k in (i, j)]
            common = [
                len(np.intersect1d(*(random.choice(a, n, replace=False) for a, n in zip(able, sizes, strict=True))))
                for _ in range(600)
            ]
            expected = chance * sum(sizes) / (1 + chance)  # what J comes from
            error = np.std(common) / math.sqrt(len(common))
            assert np.mean(common) == pytest.approx(expected, abs=4 * error)


def test_prompts_of_one_subject_are_no_pair():
    """Two prompts of each subject, in two relations, have all in common; those of different subjects nothing."""
    subjects = 6
    prompts = prompt_table(2 * subjects, relations=2).with_columns(
        relation=pl.Series(["r0", "r1"] * subjects), subject=pl.Series(np.repeat(range(subjects), 2)).cast(pl.String)
    )
    model = Model(layers=1, experts=2, width=20, shared=100 * subjects)
    lpi = np.zeros((2 * subjects, len(model.ffn)))
    shared = np.flatnonzero((model.ffn["kind"] == "shared").to_numpy())
    for i in range(2 * subjects):
        lpi[i, shared[100 * (i // 2) : 100 * (i // 2 + 1)]] = 1.0
    found = Made(0, prompts, model, slots=1, lpi=lpi).overlap()
    for comparison, name in (("samples", "r0"), ("samples", "r1"), ("strangers", None)):
        row = cell(found, kind="shared", comparison=comparison, relation=name)
        assert (row["value"], row["low"], row["high"]) == (0, 0, 0)
        assert row["chance"] == pytest.approx(expected_jaccard(100 / subjects, range(100), range(100)))
        none = cell(found, kind="routed", comparison=comparison, relation=name)
        assert (none["value"], none["low"], none["chance"]) == (None, None, None)  # no routed neuron leads anywhere
    row = cell(found, kind="routed", comparison="relations")
    assert (row["value"], row["chance"]) == (None, None)


def test_of_two_subjects_there_is_one_pair_and_no_interval():
    prompts = prompt_table(6, relations=1).with_columns(subject=pl.Series(["x", "y", "y", "z", "z", "z"]))
    row = cell(Made(2, prompts).overlap(), kind="all", comparison="samples", relation="r0")
    assert row["low"] < row["value"] < row["high"]
    prompts = prompts.with_columns(subject=pl.Series(["x", "x", "y", "y", "y", "y"]))
    table = Made(2, prompts).overlap()
    row = cell(table, kind="all", comparison="samples", relation="r0")
    assert row["value"] > 0
    assert (row["low"], row["high"]) == (None, None)
    lonely = cell(table, kind="all", comparison="strangers", relation=None)  # there is one relation
    assert (lonely["value"], lonely["chance"]) == (None, None)


# Input --------------------------------------------------------------------------------------------------------------


def test_the_order_of_rows_changes_nothing():
    made = Made(5, steps=3)
    mixed = {name: one.sample(fraction=1, shuffle=True, seed=7) for name, one in made.frames.items()}
    mixed["prompts"] = made.prompts.sample(fraction=1, shuffle=True, seed=8)
    assert made.types(**mixed).equals(made.types())
    assert made.overlap(**mixed).equals(made.overlap())
    straight, shuffled = (shared_neurons(3, one["ffn_neurons"], ["r0"], 50) for one in (made.frames, mixed))
    assert straight.equals(shuffled)


def test_neurons_of_attention_are_no_part_of_it():
    made = Made(5)
    names = made.prompts["prompt_id"].to_list()
    attention = tables.of_rows([(p, "attn", 0, None, None, 0, n, 99.0) for p in names for n in range(50)], "top_active")
    ffn = made.frames["top_active"].filter(component="ffn")
    assert made.types(top_active=pl.concat([ffn, attention])).equals(made.types(top_active=ffn))
    assert made.overlap(top_active=pl.concat([ffn, attention])).equals(made.overlap(top_active=ffn))


def test_a_model_without_shared_experts_is_refused():
    made = Made(0, model=Model(layers=2, experts=6, width=50), slots=4)
    for summary in (made.types, made.overlap, lambda: shared_neurons(3, made.frames["ffn_neurons"], ["r0"], 50)):
        with pytest.raises(NeuronTypesError, match=r"step 3: ffn_neurons has no shared neurons; .*leave this one out"):
            summary()


def test_torn_tables_are_refused():
    made = Made(0)
    first = made.prompts["prompt_id"][0]
    without = {name: made.frames[name].filter(pl.col("prompt_id") != first) for name in ("top_active", "active_sums")}
    ffn = pl.col("component") == "ffn"
    short = made.frames["top_active"].filter(~ffn | (pl.col("prompt_id") != first) | (pl.col("neuron") < 20))
    unknown = made.frames["ffn_neurons"].drop("importance_r1")
    cases = [
        (made.types, {"top_active": without["top_active"]}, "top_active does not hold every prompt"),
        (made.types, {"active_sums": without["active_sums"]}, "active_sums does not hold every prompt"),
        (made.types, {"top_active": short}, "top_active lists too few neurons"),
        (made.types, {"ffn_neurons": unknown}, "ffn_neurons knows nothing of relation r1"),
        (made.overlap, {"top_active": without["top_active"]}, "top_active does not hold the prompts"),
        (
            made.overlap,
            {"ffn_neurons": made.frames["ffn_neurons"].filter(~pl.col("expert").eq_missing(pl.lit(5)))},
            "routing names experts that ffn_neurons does not know",
        ),
    ]
    for summary, changed, message in cases:
        with pytest.raises(NeuronTypesError, match=f"step 3: {message}.*; delete the results of this step"):
            summary(**changed)
    with pytest.raises(SampleError, match=r"is not in prompts\.parquet"):
        made.types(prompts=made.prompts[1:])
