"""Heads and experts interfered with, against loops over draws, hand-made tables and made-up noise."""

import math
import time

import numpy as np
import polars as pl
import pytest
from scipy.stats import binom, t

from moescope import tables
from moescope.causality import CausalityError, causality
from moescope.collaboration import CollaborationError
from moescope.pairs import Pair
from moescope.statistics import SubjectBootstrap

#: relation, subject, group: five prompts in each fold; two subjects of a fold have two prompts.
FACTS = [
    ("a", "s0", 0), ("a", "s1", 1), ("a", "s2", 2), ("b", "s0", 0), ("b", "s3", 3),
    ("a", "s5", 5), ("a", "s6", 6), ("b", "s7", 7), ("b", "s5", 5), ("b", "s8", 8),
]  # fmt: skip
CLEAN = [1, 2, 4, 20, 5, 3, 1, 2, 8, 1]
PAIR, OTHER = Pair(2, 1, 3, 7), Pair(2, 0, 4, 5)
HEADS = 3
INTERVENED = tables.SCHEMAS["expert_interventions"].columns


def prompts(facts=FACTS):
    rows = [(f"{f[0]}/{i:02}", f[0], "x", f[1], "o", "{} is", f"{f[1]} is", f[2]) for i, f in enumerate(facts)]
    return tables.of_rows(rows, "prompts")


def inside(fold, facts=FACTS):
    return [i for i, fact in enumerate(facts) if fold is None or fact[2] // 5 == fold]


def run(experiment, ranks, fold=None, facts=FACTS, **labels):
    """Rows of one run, of all prompts or those of a fold."""
    names = {**dict.fromkeys(INTERVENED), "experiment": experiment, "control": "none", "fold": fold, **labels}
    return [
        tuple({**names, "prompt_id": f"{facts[i][0]}/{i:02}", "rank": ranks[i], "log_prob": -1.0}.values())
        for i in inside(fold, facts)
    ]


def answers(suppressed, forced, other_heads=(), other_experts=(), pair=PAIR, fold=None, facts=FACTS):
    """Suppression and forcing of one pair, and of the seeds of their controls."""
    rows = []
    for experiment, own, others in (("suppression", suppressed, other_heads), ("forcing", forced, other_experts)):
        names = {"mode": pair.label, "layer": pair.head_layer, "head": pair.head, "fold": fold, "facts": facts}
        rows += run(experiment, own, **names)
        for s, ranks in enumerate(others):
            rows += run(experiment, ranks, control="random", seed=s, **names)
    return rows


def gate_rows(suppressed, others=(), pair=PAIR, fold=None, layers=(2, 3, 4), clean=None, facts=FACTS):
    """What is left of the probabilities of every layer, [layers, prompts], of the pair's expert as of the top K."""
    clean = np.full(len(facts), 0.8) if clean is None else clean
    rows = []
    for control, seed, left in (("none", None, suppressed), *(("random", s, one) for s, one in enumerate(others))):
        left = np.broadcast_to(left, (len(layers), len(facts)))
        for i in inside(fold, facts):
            for place, layer in enumerate(layers):
                names = (pair.head_layer, pair.head, control, seed, f"{facts[i][0]}/{i:02}", layer)
                rows.append((*names, None, clean[i], clean[i] * left[place, i]))
                if layer == pair.layer:
                    rows.append((*names, pair.expert, clean[i] / 4, clean[i] / 4 * left[place, i] ** 2))
    return rows


def gradient_rows(attribution, rest=0.2, gap=0.01, pair=PAIR, fold=None, facts=FACTS):
    """``attribution`` [heads] or [heads, prompts]."""
    attribution = np.asarray(attribution, dtype=float)
    if attribution.ndim == 1:
        attribution = np.repeat(attribution[:, None], len(facts), axis=1)
    rows = []
    for i in inside(fold, facts):
        for head, value in enumerate([*attribution[:, i], rest]):
            names = (pair.head_layer, None if head == len(attribution) else head, pair.layer, pair.expert)
            rows.append((f"{facts[i][0]}/{i:02}", *names, value, gap))
    return rows


class Case:
    """Tables of one checkpoint, pair by pair; ``r`` where each was found, null: not listed."""

    def __init__(self, facts=FACTS, clean=CLEAN):
        self.facts, self.runs = facts, run("clean", clean, facts=facts)
        self.gates, self.gradients, self.associations = [], [], []

    def add(self, suppressed, forced, heads=(), experts=(), left=0.5, other_left=(), attribution=(1, 2, 1), **of):
        of = {"pair": PAIR, "fold": None, "facts": self.facts, "r": 0.9, **of}
        r = of.pop("r")
        if r is not None:
            self.associations.append((None, of["fold"], *of["pair"], r, 0.01, *(None,) * 2, 0.3, 0.5, 100, 5))
        self.runs += answers(suppressed, forced, heads, experts, **of)
        self.gates += gate_rows(left, other_left, **of)
        self.gradients += gradient_rows(attribution, **of)
        return self

    def tables(self):
        named = {"expert_interventions": self.runs, "gates": self.gates, "gradients": self.gradients}
        named["associations"] = self.associations
        return [tables.of_rows(rows, name) for name, rows in named.items()]

    def table(self, seed=0):
        return causality(10, *self.tables(), prompts(self.facts), seed)


def cell(table, quantity, pair=PAIR, fold=None, gate_layer=None, sign=None):
    """The row of a pair, or of all pairs of a sign."""
    keys = {"quantity": quantity, "fold": fold, "gate_layer": gate_layer}
    keys |= pair._asdict() if pair else {**dict.fromkeys(Pair._fields), "sign": sign}
    rows = table.filter(*(pl.col(key).eq_missing(pl.lit(value)) for key, value in keys.items()))
    assert len(rows) == 1, rows
    return rows.row(0, named=True)


def means(values, fold=None, facts=FACTS):
    """Row 0 the sample, then every draw, in a loop over draws: prompts copied as often as their subject is drawn."""
    bootstrap = SubjectBootstrap.draw({fact[1] for fact in facts})
    places = [(i, bootstrap.subjects.index(facts[i][1])) for i in inside(fold, facts)]
    drawn = []
    for counts in bootstrap.counts:
        copies = [value for i, place in places for value in [values[i]] * int(counts[place])]
        drawn.append(np.mean(copies) if copies else np.nan)
    return np.array(drawn)


def mrr(ranks, fold=None, facts=FACTS):
    return means(1 / np.array(ranks), fold, facts)


def ends(draws, reach=0.0):
    low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
    return [draws[0] - math.hypot(draws[0] - low, reach), draws[0] + math.hypot(high - draws[0], reach)]


def reach_of(seeds, one_more=False):
    """What differs between the seeds of a control, for their mean, or for another draw beside it."""
    n = len(seeds)
    return t.ppf(0.975, n - 1) * np.std(seeds, ddof=1) * math.sqrt(1 / n + one_more)


def interval(found, prefix=""):
    return [found[f"{prefix}{end}"] for end in ("low", "high")]


# Known answers -------------------------------------------------------------------------------------------------------


def test_half_the_gate_and_all_of_the_recovery():
    """Suppression doubles every rank and halves the gate; the pair's expert brings all back, another nothing."""
    double = [2 * rank for rank in CLEAN]
    table = Case().add(double, CLEAN, [CLEAN] * 2, [double] * 2, other_left=[1.0, 1.0]).table()
    for quantity, value, control in (
        ("gate_drop", 0.5, 0), ("expert_gate_drop", 0.75, 0), ("mrr_drop", 0.5, 0), ("forced_mrr", 1, 0.5),
        ("recovery", 1, 0),
    ):  # fmt: skip
        found = cell(table, quantity)
        for prefix, number in (("", value), ("control_", control), ("excess_", value - control)):
            expected = [number] * 3  # the same for every prompt: no width
            assert [found[f"{prefix}value"], *interval(found, prefix)] == pytest.approx(expected, abs=1e-6), quantity
        assert (found["step"], found["prompts"]) == (10, 10)
    assert [cell(table, "gate_drop", gate_layer=layer)["value"] for layer in (2, 3, 4)] == pytest.approx([0.5] * 3)


def test_gate_drops_are_ratios_of_sums_by_layer():
    """Not means of ratios: prompts with a small clean probability count little."""
    random = np.random.default_rng(0)
    clean, left, other = random.random(10), random.random((3, 10)), random.random((2, 3, 10))
    case = Case().add(CLEAN, CLEAN)
    case.gates = gate_rows(left, other, clean=clean)
    table = case.table()
    drops = []
    for place, layer in enumerate((2, 3, 4)):
        value = 1 - means(clean * left[place]) / means(clean)
        each = [1 - means(clean * one[place]) / means(clean) for one in other]
        seeds = [one[0] for one in each]
        found = cell(table, "gate_drop", gate_layer=layer)
        control = np.mean(each, axis=0)
        assert found["value"] == pytest.approx(value[0])
        assert interval(found) == pytest.approx(ends(value))
        assert interval(found, "control_") == pytest.approx(ends(control, reach_of(seeds)))
        assert found["excess_value"] == pytest.approx(value[0] - control[0])
        assert interval(found, "excess_") == pytest.approx(ends(value - control, reach_of(seeds, one_more=True)))
        drops.append((value, each))
    over_layers = np.mean([value for value, _ in drops], axis=0)
    found = cell(table, "gate_drop")
    assert found["value"] == pytest.approx(over_layers[0])
    assert interval(found) == pytest.approx(ends(over_layers))
    each = np.mean([each for _, each in drops], axis=0)
    reach = reach_of(each[:, 0], one_more=True)
    assert interval(found, "excess_") == pytest.approx(ends(over_layers - each.mean(axis=0), reach))
    own = 1 - means(clean * left[1] ** 2) / means(clean)  # layer 3 is the expert's
    assert cell(table, "expert_gate_drop")["value"] == pytest.approx(own[0])
    assert interval(cell(table, "expert_gate_drop")) == pytest.approx(ends(own))


WITHOUT = [4, 3, 40, 20, 50, 9, 2, 2, 80, 1]
FORCED = [1, 3, 30, 20, 6, 3, 1, 2, 70, 2]
HEADS_OFF = [[1, 2, 5, 20, 5, 3, 1, 3, 8, 1], [2, 2, 4, 20, 6, 3, 2, 2, 8, 1], CLEAN]
EXPERTS = [WITHOUT, [4, 3, 30, 20, 9, 9, 2, 2, 70, 1]]


@pytest.mark.parametrize("fold", [None, 0, 1])
def test_answers_equal_a_loop_over_draws(fold):
    """A fold's rows are of its prompts alone, beside the clean run of the same prompts."""
    table = Case().add(WITHOUT, FORCED, HEADS_OFF, EXPERTS, other_left=[1.0] * 3, fold=fold).table()
    clean, without, forced = (mrr(ranks, fold) for ranks in (CLEAN, WITHOUT, FORCED))
    with np.errstate(invalid="ignore", divide="ignore"):
        lost = np.where(clean - without >= 0.01 * clean, clean - without, np.nan)
        expected = {
            "mrr_drop": (1 - without / clean, [1 - mrr(ranks, fold) / clean for ranks in HEADS_OFF]),
            "forced_mrr": (forced / clean, [mrr(ranks, fold) / clean for ranks in EXPERTS]),
            "recovery": ((forced - without) / lost, [(mrr(ranks, fold) - without) / lost for ranks in EXPERTS]),
        }
    for quantity, (value, each) in expected.items():
        found = cell(table, quantity, fold=fold)
        control, seeds = np.mean(each, axis=0), [one[0] for one in each]
        if np.isnan(value).mean() > 0.025:  # lost in too few draws to be sure of
            assert [found["value"], *interval(found)] == [pytest.approx(value[0]), None, None]
            continue
        assert found["value"] == pytest.approx(value[0])
        assert interval(found) == pytest.approx(ends(value))
        assert found["control_value"] == pytest.approx(control[0])
        assert interval(found, "control_") == pytest.approx(ends(control, reach_of(seeds)))
        assert found["excess_value"] == pytest.approx(value[0] - control[0])
        assert interval(found, "excess_") == pytest.approx(ends(value - control, reach_of(seeds, one_more=True)))
        assert found["prompts"] == len(inside(fold))


@pytest.mark.parametrize(
    ("without", "known"),
    [([1000] * 10, True), (CLEAN, False), ([1] * 10, False), ([1, 2, 4, 21, 5, 3, 1, 2, 8, 1], False)],
)
def test_nothing_recovers_what_was_not_lost(without, known):
    """Suppression that changes nothing, helps, or takes away less than 1% of the MRR."""
    table = Case().add(without, [1] * 10, [CLEAN] * 2, [CLEAN] * 2, other_left=[1.0] * 2).table()
    for pair in (PAIR, None):
        found = cell(table, "recovery", pair)
        names = [f"{prefix}{end}" for prefix in ("", "control_", "excess_") for end in ("value", "low", "high")]
        assert all((found[name] is not None) is known for name in names)
        assert found["prompts"] == 10
        assert cell(table, "forced_mrr", pair)["value"] is not None


def test_gradient_shares_by_hand():
    """Head 1 of three has 0.3, and -0.1 in the second half of the prompts; head 2 pulls the other way throughout."""
    attribution = np.repeat([[0.1], [0.3], [-0.2]], 10, axis=1)
    attribution[1, 5:] = -0.1
    case = Case().add(CLEAN, CLEAN)
    gap = np.array([0.02, -0.02, 0.02, 0.02, -0.02] * 2)
    case.gradients = [(*row[:-1], gap[int(row[0][2:])]) for row in gradient_rows(attribution, rest=0.2)]
    table = case.table()
    own, heads = np.where(np.arange(10) < 5, 0.3, 0), np.where(np.arange(10) < 5, 0.4, 0.1)
    share, with_rest = means(own) / means(heads), means(own) / means(heads + 0.2)
    probability = means(np.where(np.arange(10) < 5, 0.4, 0.0) - gap)  # attributions and rest add up to both
    found = cell(table, "gradient_share")
    assert found["value"] == pytest.approx(1.5 / 2.5)
    assert interval(found) == pytest.approx(ends(share), rel=1e-5)
    assert (found["control_value"], *interval(found, "control_")) == (pytest.approx(1 / HEADS), None, None)
    assert found["excess_value"] == pytest.approx(0.6 - 1 / 3)
    assert interval(found, "excess_") == pytest.approx([end - 1 / 3 for end in ends(share)], rel=1e-5)
    found = cell(table, "gradient_share_with_rest")
    assert found["value"] == pytest.approx(1.5 / 4.5)
    assert interval(found) == pytest.approx(ends(with_rest), rel=1e-5)
    assert found["control_value"] == pytest.approx(2.5 / 4.5 / HEADS)  # the mean head
    mean = means(heads) / means(heads + 0.2) / HEADS
    assert interval(found, "control_") == pytest.approx(ends(mean), rel=1e-5)
    assert interval(found, "excess_") == pytest.approx(ends(with_rest - mean), rel=1e-5)
    found = cell(table, "gradient_gap")
    assert found["value"] == pytest.approx(0.02 / (0.2 - 0.004))  # signs do not cancel
    with np.errstate(divide="ignore"):
        gaps = np.where(probability > 1e-9, means(np.abs(gap)) / probability, np.nan)
    assert interval(found) == pytest.approx(ends(gaps), rel=1e-4)
    assert (found["control_value"], found["excess_value"]) == (None, None)
    nothing = Case().add(CLEAN, CLEAN, attribution=(-1, -1, -1)).table()
    assert cell(nothing, "gradient_share")["value"] is None
    assert cell(nothing, "gradient_share_with_rest")["value"] == 0


def test_equal_heads_have_the_share_of_chance():
    found = cell(Case().add(CLEAN, CLEAN, attribution=[0.1] * 8).table(), "gradient_share")
    assert (found["value"], found["control_value"]) == (pytest.approx(1 / 8), 1 / 8)
    assert [found["excess_value"], *interval(found, "excess_")] == pytest.approx([0] * 3, abs=1e-7)


# All pairs -----------------------------------------------------------------------------------------------------------


def test_pooled_rows_are_means_over_pairs_and_folds_of_one_draw():
    """Two pairs, one of them in both folds: every draw holds the same subjects in all of them."""
    places = [(PAIR, 0, WITHOUT, 0.5), (PAIR, 1, FORCED, 0.25), (OTHER, 1, WITHOUT, 0.0)]
    case = Case()
    for pair, fold, without, left in places:
        case.add(without, FORCED, HEADS_OFF, EXPERTS, left, [1.0] * 3, pair=pair, fold=fold)
    table = case.table()
    drop, others = [], []
    for _, fold, without, _ in places:
        clean = mrr(CLEAN, fold)
        with np.errstate(invalid="ignore"):
            drop.append(1 - mrr(without, fold) / clean)
            others.append([1 - mrr(ranks, fold) / clean for ranks in HEADS_OFF])
    value, each = np.nanmean(drop, axis=0), np.nanmean(others, axis=0)
    found = cell(table, "mrr_drop", None)
    assert found["value"] == pytest.approx(value[0])
    assert interval(found) == pytest.approx(ends(value))
    excess = value - each.mean(axis=0)
    assert found["control_value"] == pytest.approx(each[:, 0].mean())
    assert interval(found, "control_") == pytest.approx(ends(each.mean(axis=0), reach_of(each[:, 0])))
    assert found["excess_value"] == pytest.approx(excess[0])
    assert interval(found, "excess_") == pytest.approx(ends(excess, reach_of(each[:, 0], one_more=True)))
    assert found["prompts"] == 10
    assert cell(table, "gate_drop", None)["value"] == pytest.approx((0.5 + 0.75 + 1) / 3)
    pooled = table.filter(pl.col("head_layer").is_null(), pl.col("sign").is_null())
    assert pooled["gate_layer"].is_null().all()
    assert sorted(pooled["quantity"]) == sorted(table["quantity"].unique())
    assert set(table.drop_nulls("head_layer").select("head", "fold").iter_rows()) == {(1, 0), (1, 1), (0, 1)}


def test_pooled_recovery_is_what_comes_back_of_the_mean_loss():
    """Of fold 1 suppression gains more than it loses, so that the pair has no recovery of its own; it counts with what
    it gains. The mean of ratios would be another number, and so would that of the pairs that have one."""
    gained = [*CLEAN[:5], 1, 1, 2, 8, 2]
    case = Case().add(WITHOUT, FORCED, [CLEAN] * 2, EXPERTS, other_left=[1.0] * 2, fold=0)
    case.add(gained, CLEAN, [CLEAN] * 2, EXPERTS[::-1], other_left=[1.0] * 2, fold=1)
    case.add(WITHOUT, CLEAN, [CLEAN] * 2, EXPERTS, other_left=[1.0] * 2, pair=OTHER, fold=0)
    table = case.table()
    assert cell(table, "recovery", fold=1)["value"] is None
    places = [(WITHOUT, FORCED, EXPERTS, 0), (gained, CLEAN, EXPERTS[::-1], 1), (WITHOUT, CLEAN, EXPERTS, 0)]
    lost = np.nansum([mrr(CLEAN, fold) - mrr(without, fold) for without, *_, fold in places], axis=0)
    clean = np.nansum([mrr(CLEAN, fold) for *_, fold in places], axis=0)
    assert (lost >= 0.01 * clean).mean() > 0.975
    lost = np.where(lost >= 0.01 * clean, lost, np.nan)
    back = np.nansum([mrr(forced, fold) - mrr(without, fold) for without, forced, _, fold in places], axis=0)
    seeds = [
        np.nansum([mrr(experts[s], fold) - mrr(without, fold) for without, _, experts, fold in places], axis=0) / lost
        for s in (0, 1)
    ]
    found, value, control = cell(table, "recovery", None), back / lost, np.mean(seeds, axis=0)
    assert found["value"] == pytest.approx(value[0])
    assert interval(found) == pytest.approx(ends(value))
    first = [one[0] for one in seeds]
    assert found["control_value"] == pytest.approx(control[0])
    assert interval(found, "control_") == pytest.approx(ends(control, reach_of(first)))
    assert interval(found, "excess_") == pytest.approx(ends(value - control, reach_of(first, one_more=True)))
    assert found["prompts"] == 10
    alone = [cell(table, "recovery", pair, 0)["value"] for pair in (PAIR, OTHER)]
    assert abs(found["value"] - np.mean(alone)) > 0.01


def test_pooled_recovery_of_pairs_that_lose_nothing_together():
    """One loses what the other gains: nothing is lost, and no share of it comes back."""
    loses, gains_it = [*CLEAN[:4], 50, *CLEAN[5:]], [1, 1, *CLEAN[2:]]
    case = Case().add(loses, CLEAN, fold=0).add(gains_it, CLEAN, pair=OTHER, fold=0)
    table = case.table()
    assert cell(table, "recovery", fold=0)["value"] == pytest.approx(1)
    found = cell(table, "recovery", None)
    assert (found["value"], *interval(found)) == (None,) * 3


def test_one_pair_pools_to_itself():
    table = Case().add(WITHOUT, FORCED, HEADS_OFF, EXPERTS, other_left=[0.8, 0.9]).table()
    numbers = tables.SCHEMAS["causality"].columns.keys() - {*Pair._fields, "fold", "sign"}
    for quantity in table["quantity"].unique():
        own = cell(table, quantity)
        for pooled in (cell(table, quantity, None, sign=sign) for sign in (None, "+")):
            assert {name: own[name] for name in numbers} == {name: pooled[name] for name in numbers}


def test_pairs_of_either_sign_do_not_cancel():
    """The head of one pair turns its expert up, that of the other turns its own down, as r says: without its head the
    one expert loses half of its probability, and the other gains half. Other heads do a little of both."""
    up, down = math.sqrt(0.5), math.sqrt(1.5)  # an expert's gate is left with the square
    case = Case().add(WITHOUT, FORCED, HEADS_OFF, EXPERTS, up, [0.9, 1.0, 1.1], (1, 2, -3), r=0.6)
    case.add(WITHOUT, FORCED, HEADS_OFF, EXPERTS, down, [1.1, 0.9, 0.8], (-1, -2, 6), r=-0.7, pair=OTHER)
    table = case.table()
    signs = table.drop_nulls("head").select("head", "sign").unique().sort("head").rows()
    assert signs == [(0, "-"), (1, "+")]
    one, two = cell(table, "expert_gate_drop"), cell(table, "expert_gate_drop", OTHER)
    assert (one["value"], two["value"]) == (pytest.approx(0.5, abs=1e-6), pytest.approx(-0.5, abs=1e-6))
    found = cell(table, "expert_gate_drop", None)
    seeds = np.array([[1 - 0.9**2, 0, 1 - 1.1**2], [1 - 1.1**2, 1 - 0.9**2, 1 - 0.8**2]])
    assert found["value"] == pytest.approx(0.5, abs=1e-6)
    assert found["control_value"] == pytest.approx((seeds[0].mean() - seeds[1].mean()) / 2, abs=1e-6)
    assert found["excess_value"] == pytest.approx(0.5 - found["control_value"], abs=1e-6)
    reach = reach_of((seeds[0] - seeds[1]) / 2, one_more=True)  # every prompt is alike, seeds alone differ
    around = [found["excess_value"] - reach, found["excess_value"] + reach]
    assert interval(found, "excess_") == pytest.approx(around, abs=1e-5)
    for sign, own in (("+", one), ("-", two)):
        pooled = cell(table, "expert_gate_drop", None, sign=sign)
        assert [pooled[name] for name in ("value", "low", "high")] == [own[name] for name in ("value", "low", "high")]
        assert interval(pooled, "excess_") == interval(own, "excess_")
    for quantity in ("gate_drop", "mrr_drop", "recovery", "gradient_share"):  # as they are
        mean = np.mean([cell(table, quantity, pair)["value"] for pair in (PAIR, OTHER)])
        assert cell(table, quantity, None)["value"] == pytest.approx(mean, abs=1e-6)


def test_a_head_of_negative_sign_has_its_share_of_negative_attribution():
    """Head 0 of three takes 0.3 away, in half of the prompts it adds; head 1 takes 0.1, head 2 adds."""
    attribution = np.repeat([[-0.3], [-0.1], [0.5]], 10, axis=1)
    attribution[0, 5:] = 0.2
    case = Case().add(CLEAN, CLEAN, r=-0.5, pair=OTHER)
    case.gradients = gradient_rows(attribution, rest=0.2, pair=OTHER)
    table = case.table()
    own, heads = np.where(np.arange(10) < 5, 0.3, 0), np.where(np.arange(10) < 5, 0.4, 0.1)
    found = cell(table, "gradient_share", OTHER)
    assert found["value"] == pytest.approx(1.5 / 2.5)
    assert interval(found) == pytest.approx(ends(means(own) / means(heads)), rel=1e-5)
    assert found["control_value"] == pytest.approx(1 / 3)
    found = cell(table, "gradient_share_with_rest", OTHER)
    assert found["value"] == pytest.approx(1.5 / 4.5)
    assert found["control_value"] == pytest.approx(2.5 / 4.5 / 3)


def test_the_sign_is_that_of_the_same_fold_and_of_all_relations_together():
    """A pair that turned round; another relation's r, or that on all prompts, is not its sign. A named pair that is not
    listed has none: it counts as positive among all pairs, and with neither of the signs."""
    case = Case().add(CLEAN, CLEAN, r=0.4, fold=0).add(CLEAN, CLEAN, r=-0.4, fold=1)
    case.add(CLEAN, CLEAN, r=None, pair=OTHER, left=0.1)
    others = [("a", 1, *PAIR), ("a", None, *OTHER), (None, None, *PAIR)]
    case.associations += [(*one, 0.9, 0.01, None, None, 0.3, 0.5, 100, 5) for one in others]
    table = case.table()
    signs = table.drop_nulls("head").select("head", "fold", "sign").unique().sort("head", "fold").rows()
    assert signs == [(0, None, None), (1, 0, "+"), (1, 1, "-")]
    assert set(table.filter(pl.col("head").is_null())["sign"]) == {None, "+", "-"}
    drops = {sign: cell(table, "expert_gate_drop", None, sign=sign)["value"] for sign in (None, "+", "-")}
    assert drops == pytest.approx({None: (0.75 - 0.75 + 0.99) / 3, "+": 0.75, "-": 0.75}, abs=1e-6)
    assert cell(table, "gate_drop", None)["prompts"] == 10
    assert cell(table, "gate_drop", None, sign="-")["prompts"] == 5


def test_pairs_of_one_head_share_its_gates():
    """Two experts of one head, found on different folds: each has the prompts of its own fold. The gates of a third, of
    the first one's number in another layer, are another expert's."""
    second, third = Pair(PAIR.head_layer, PAIR.head, 4, 5), Pair(PAIR.head_layer, PAIR.head, 2, PAIR.expert)
    case = Case().add(CLEAN, CLEAN, left=0.5, fold=0).add(CLEAN, CLEAN, left=0.1, pair=second, fold=1)
    case.gates += [row for row in gate_rows(0.9, pair=third, fold=0) if row[-3] is not None]
    table = case.table()
    assert cell(table, "gate_drop", fold=0)["value"] == pytest.approx(0.5)
    assert cell(table, "expert_gate_drop", fold=0)["value"] == pytest.approx(0.75)
    assert cell(table, "gate_drop", second, fold=1)["value"] == pytest.approx(0.9)
    assert cell(table, "expert_gate_drop", second, fold=1)["value"] == pytest.approx(0.99)


def test_no_pairs_no_rows():
    assert Case().table().is_empty()


# Few seeds and subjects, noise ---------------------------------------------------------------------------------------


def test_without_controls_there_is_a_value_alone():
    table = Case().add(WITHOUT, FORCED).table()
    for pair in (PAIR, None):
        found = cell(table, "mrr_drop", pair)
        assert None not in (found["value"], *interval(found))
        for prefix in ("control_", "excess_"):
            assert [found[f"{prefix}value"], *interval(found, prefix)] == [None] * 3
    table = Case().add(WITHOUT, FORCED, HEADS_OFF[:1], EXPERTS[:1], other_left=[1.0]).table()
    found = cell(table, "mrr_drop")  # one seed
    assert found["control_value"] is not None
    assert (found["excess_value"] is not None, *interval(found, "excess_")) == (True, None, None)


def test_a_single_subject_has_no_interval():
    """Fold 1 asks about one subject; a mean over pairs has no interval for want of one pair's."""
    facts = [*FACTS[:5], ("a", "s5", 5), ("b", "s5", 5)]
    few = [ranks[:7] for ranks in (CLEAN, WITHOUT, FORCED)]
    case = Case(facts, few[0])
    for fold in (0, 1):
        case.add(few[1], few[2], [few[0]] * 2, [few[1]] * 2, other_left=[1.0, 1.0], fold=fold)
    table = case.table()
    ends_of = pl.col("^.*(low|high)$")
    for rows in (table.filter(fold=1), table.filter(pl.col("head_layer").is_null())):
        assert len(rows) > 0
        assert rows.select(ends_of).null_count().row(0) == (len(rows),) * 6
        assert rows["value"].null_count() == 0
    assert cell(table, "mrr_drop", fold=0)["low"] is not None


def test_heads_without_structure_do_not_exceed_their_controls():
    """The pair's head does what any head does: at most about 5% of the excesses exclude 0."""
    random = np.random.default_rng(2)
    facts = [("a", f"s{i % 40}", i % 40 % 10) for i in range(60)]
    clean = random.integers(1, 20, 60).tolist()

    def noise():
        of_subject = random.lognormal(0, 0.7, 40)
        return [max(1, round(rank * of_subject[i % 40])) for i, rank in enumerate(clean)]

    excluded = {"mrr_drop": 0, "gate_drop": 0}
    for _ in range(50):
        left, *others = random.random((6, 3, 60))
        case = Case(facts, clean).add(noise(), noise(), [noise() for _ in range(5)], left=left, other_left=others)
        table = case.table()
        for quantity in excluded:
            low, high = interval(cell(table, quantity), "excess_")
            excluded[quantity] += low > 0 or high < 0
    assert max(excluded.values()) <= binom.ppf(0.999, 50, 0.05)


def test_a_head_like_others_that_differ_exceeds_them_as_rarely_as_stated():
    """Heads differ, prompts hardly: the pair's is one more of them. Held against their mean as if that alone were
    unsure, it would be beyond them in about a third of the cases."""
    random, excluded, samples = np.random.default_rng(3), 0, 60
    for _ in range(samples):
        levels = 0.6 + 0.1 * random.normal(size=(6, 1, 1)) + 0.001 * random.normal(size=(6, 3, 10))
        case = Case().add(CLEAN, CLEAN, [CLEAN] * 5, [CLEAN] * 5, levels[0], levels[1:])
        low, high = interval(cell(case.table(), "gate_drop"), "excess_")
        excluded += low > 0 or high < 0
    assert excluded <= binom.ppf(0.999, samples, 0.05) < binom.ppf(0.01, samples, 0.32)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_rows_in_another_order_change_nothing():
    case = Case()
    for pair, fold in ((PAIR, 0), (OTHER, 1), (PAIR, 1)):
        case.add(WITHOUT, FORCED, HEADS_OFF, EXPERTS, other_left=[0.9] * 3, pair=pair, fold=fold)
    parts = [frame.sample(fraction=1, shuffle=True, seed=i) for i, frame in enumerate((*case.tables(), prompts()))]
    assert causality(10, *parts).equals(case.table())
    assert not case.table(seed=1).equals(case.table(seed=2))


def gone(rows, place=-1):
    del rows[place]


def moved(rows):
    """The last prompt's rank stands under a prompt of the other fold."""
    rows[-1] = (*rows[-1][:-3], "a/00", *rows[-1][-2:])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda case: gone(case.runs), r"does not have each prompt once in expert_interventions\.parquet; delete"),
        (lambda case: moved(case.runs), r"does not have each prompt once in expert_interventions\.parquet"),
        (lambda case: gone(case.gates), r"does not have each prompt once in gates\.parquet"),
        (lambda case: case.gates.clear(), r"is not there itself in gates\.parquet"),
        (lambda case: gone(case.gradients), r"does not have each prompt once in gradients\.parquet"),
        (lambda case: case.gradients.clear(), r"without the rest in gradients\.parquet"),
        (lambda case: case.associations.clear(), r"is not listed in associations\.parquet; delete"),
    ],
)
def test_incomplete_pairs_are_named(break_it, message):
    case = Case().add(WITHOUT, FORCED, HEADS_OFF, EXPERTS, other_left=[0.9] * 3, fold=1)
    break_it(case)
    with pytest.raises(CausalityError, match=r"step 10: H\(2,1\)-E\(3,7\).* " + message):
        case.table()


def test_parts_that_are_missing_altogether_are_named():
    case = Case().add(WITHOUT, FORCED, HEADS_OFF, EXPERTS, other_left=[0.9] * 3)
    names = list(INTERVENED)
    control, head = names.index("control"), 2
    own_gone = [row for row in case.runs if row[0] != "suppression" or row[control] == "random"]
    rest_gone = [row for row in case.gradients if row[head] is not None]
    without_clean = [row for row in case.runs if row[0] != "clean"]
    twice = [*case.runs, *run("suppression", WITHOUT, mode=PAIR.label, layer=2, head=0)]
    runs, *others = case.tables()
    gates, _, associations = others
    for rows, error, message in (
        (own_gone, CausalityError, "is not there itself in expert_interventions"),
        (twice, CausalityError, "does not have each prompt once"),
        (without_clean, CollaborationError, "has no clean run"),
    ):
        with pytest.raises(error, match=message):
            causality(10, tables.of_rows(rows, "expert_interventions"), *others, prompts())
    with pytest.raises(CausalityError, match="without the rest in gradients"):
        causality(10, runs, gates, tables.of_rows(rest_gone, "gradients"), associations, prompts())


def test_real_sizes_are_quick():
    """Ten pairs in both folds of 906 prompts: 16 heads, five later layers, five seeds of each control."""
    facts = [(f"r{i % 12:02}", f"s{i % 780}", i % 780 % 10) for i in range(906)]
    ranks = np.random.default_rng(0).integers(1, 100, 906).tolist()
    case = Case(facts, ranks)
    for n in range(10):
        for fold in (0, 1):
            case.add(
                ranks, ranks, [ranks] * 5, [ranks] * 5, other_left=[0.9] * 5, attribution=[0.1] * 16,
                pair=Pair(2, n, 3, n), fold=fold,
            )  # fmt: skip
    parts = case.tables()
    known = prompts(facts)
    start = time.process_time()
    assert len(causality(10, *parts, known)) == 20 * (8 + 3) + 2 * 8
    assert time.process_time() - start < 30
