"""Sets that are taken away: the largest, cross-fitted, random and matched, against selections by hand and by scipy."""

import itertools
import math
from collections import Counter

import numpy as np
import polars as pl
import pytest
from scipy import stats

from moescope import selection
from moescope.selection import SelectionError

LAYERS, HEADS, PROMPTS = 3, 5, 60


def tables(seed=0, kinds=("routed", "shared"), experts=5, width=40):
    """Random scores: a mixture with a shared expert, 60 prompts of three relations and 20 subjects."""
    random = np.random.default_rng(seed)
    prompts = pl.DataFrame(
        {
            "prompt_id": [f"r{i % 3}/{i:02}" for i in range(PROMPTS)],
            "relation": [f"r{i % 3}" for i in range(PROMPTS)],
            "group": [i // 3 % 10 for i in range(PROMPTS)],
        }
    ).sort("prompt_id")
    heads = pl.DataFrame(
        [(p, layer, h) for p in prompts["prompt_id"] for layer in range(LAYERS) for h in range(HEADS)],
        schema=["prompt_id", "layer", "head"],
        orient="row",
    ).with_columns(lpi=pl.Series(random.normal(size=PROMPTS * LAYERS * HEADS), dtype=pl.Float32))
    sizes = {"routed": range(experts), "shared": [None], "dense": [None]}
    ids = pl.DataFrame(
        [(la, k, e, n) for la in range(LAYERS) for k in kinds for e in sizes[k] for n in range(width)],
        schema={"layer": pl.Int32, "kind": pl.String, "expert": pl.Int32, "neuron": pl.Int32},
        orient="row",
    )
    sums = random.standard_t(2, size=(len(ids), 10))
    groups = ids.with_columns(pl.Series(f"group_{g}", sums[:, g], dtype=pl.Float32) for g in range(10))
    neurons = ids.with_columns(
        pl.Series("active", random.integers(0, 60, len(ids))),
        pl.Series("magnitude", random.lognormal(size=len(ids))),
        pl.Series("importance", sums.sum(1) / PROMPTS),
        *(pl.Series(f"importance_r{r}", random.normal(size=len(ids))) for r in range(3)),
    )
    return {"heads": heads, "ffn_neurons": neurons, "ffn_groups": groups}, prompts


FRAMES, ROWS = tables()
PLAN = selection.plan(FRAMES, ROWS, selection.RANKINGS, seeds=3)


def chosen(plan, **fields):
    return [i for i in plan.interventions if all(getattr(i, k) == v for k, v in fields.items())]


@pytest.mark.parametrize(
    ("size", "total", "count"),
    [("1", 32, 1), ("10", 256, 10), ("1%", 32, 1), ("1%", 100, 1), ("1%", 101, 2), ("0.1%", 4144, 5), ("3%", 100, 3),
     ("0.3%", 1000, 3), ("1%", 1_048_576, 10_486), ("0.1%", 1_000_000, 1000)],
)  # fmt: skip
def test_a_share_is_rounded_up_exactly(size, total, count):
    assert selection.size_of(size, total) == count


def test_every_selection_is_the_largest_by_its_own_scores():
    """In-sample, cross-fitted and per relation; sorting by hand, prompt by prompt and group by group."""
    neurons, index = FRAMES["ffn_neurons"], PLAN.index["ffn_neuron"]
    assert index.equals(neurons.select(index.columns).sort(index.columns, nulls_last=True))
    heads = FRAMES["heads"].join(ROWS, on="prompt_id")
    found = 0
    for i in chosen(PLAN, control="none"):
        ids = PLAN.index[i.site][i.units].rows()
        tested = ROWS[i.prompts]
        if i.ranking == "per_relation":
            (relation,) = tested["relation"].unique()
            selecting = heads.filter(pl.col("relation") == relation)
            scores = neurons[f"importance_{relation}"].to_list()
            assert len(tested) == (ROWS["relation"] == relation).sum()
        elif i.fold is None:
            selecting, scores = heads, neurons["importance"].to_list()
            assert len(tested) == PROMPTS
        else:
            mine, others = (range(5), range(5, 10)) if i.fold == 0 else (range(5, 10), range(5))
            assert sorted(i.prompts) == [p for p, g in enumerate(ROWS["group"]) if g in mine]
            selecting = heads.filter(pl.col("group").is_in(list(others)))
            scores = [sum(r[f"group_{g}"] for g in others) for r in FRAMES["ffn_groups"].to_dicts()]
        if i.site == "head":
            means = selecting.group_by("layer", "head").agg(pl.col("lpi").cast(pl.Float64).mean())
            scored = {row[:2]: row[2] for row in means.rows()}
        else:
            scored = dict(zip(neurons.select(index.columns).rows(), scores, strict=True))
        key = abs if i.ranking == "abs" else float
        count = selection.size_of(i.size, len(scored))
        assert set(ids) == set(sorted(scored, key=lambda u: -key(scored[u]))[:count])
        found += 1
    sizes = 3 + 4
    assert found == sizes * (2 * 3 + 3)


def test_what_is_controlled_by_what():
    """Random sets once per size, for all prompts; matched ones where the selection is out of sample, or can't be."""
    assert len(chosen(PLAN, control="random")) == 7 * 3
    assert all((i.ranking, i.fold, len(i.prompts)) == (None, None, PROMPTS) for i in chosen(PLAN, control="random"))
    matched = Counter((i.site, i.ranking, i.fold) for i in chosen(PLAN, control="matched", size="1%"))
    expected = {(s, r, f): 3 for s in selection.SITES for r in ("signed", "abs") for f in (0, 1)}
    assert matched == expected | {(s, "per_relation", None): 9 for s in selection.SITES}
    for i in chosen(PLAN, control="matched"):
        same = chosen(PLAN, control="none", site=i.site, size=i.size, ranking=i.ranking, fold=i.fold)
        assert any(np.array_equal(i.prompts, s.prompts) for s in same)


def test_random_sets_are_of_the_size_and_do_not_depend_on_the_scores():
    other = selection.plan(*tables(seed=9), seeds=3)
    for i in chosen(PLAN, control="random"):
        total = len(PLAN.index[i.site])
        assert len(set(i.units)) == len(i.units) == selection.size_of(i.size, total)
        (same,) = chosen(other, control="random", site=i.site, size=i.size, seed=i.seed)
        assert np.array_equal(same.units, i.units)
    sets = [tuple(i.units) for i in chosen(PLAN, control="random", site="ffn_neuron")]
    assert len(set(sets)) == len(sets)
    seeded = selection.plan(FRAMES, ROWS, seeds=3, seed=1)
    (one,), (two,) = (chosen(p, control="random", site="ffn_neuron", size="3%", seed=0) for p in (PLAN, seeded))
    assert not np.array_equal(one.units, two.units)
    # equal numbers share their controls, so that nothing runs twice
    (one,), (two,) = (chosen(PLAN, control="random", site="head", size=s, seed=0) for s in ("1", "1%"))
    assert np.array_equal(one.units, two.units)


def test_random_sets_are_uniform():
    counts = np.zeros(len(PLAN.index["ffn_neuron"]))
    for i in chosen(selection.plan(FRAMES, ROWS, (), seeds=400), site="ffn_neuron", size="3%"):
        counts[i.units] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def decile(values):
    """By scipy's ranks."""
    return (10 * (stats.rankdata(values, method="min") - 1) // len(values)).astype(int)


def test_deciles_hold_a_tenth_each_and_equal_values_share_one():
    random = np.random.default_rng(0)
    within, values = random.permutation(np.repeat([3, 8], [100, 250])), random.normal(size=350)
    found = selection.deciles(values, within)
    for one, size in ((3, 10), (8, 25)):
        assert np.array_equal(found[within == one], decile(values[within == one]))
        assert Counter(found[within == one]) == dict.fromkeys(range(10), size)
    assert selection.deciles(np.ones(50), np.zeros(50)).tolist() == [0] * 50


def test_matched_neurons_match():
    """Layer and kind always, outside the set, no neuron twice; deciles exactly for the share that is reported."""
    table = FRAMES["ffn_neurons"].sort(PLAN.index["ffn_neuron"].columns, nulls_last=True).with_row_index("row")
    cells = {}
    for _, part in table.partition_by("layer", "kind", as_dict=True).items():
        both = zip(part["row"], decile(part["active"]), decile(part["magnitude"]), strict=True)
        cells |= {row: (a, m) for row, a, m in both}
    layer_kind = table.select("layer", "kind").rows()
    shares = {(m["size"], m["ranking"], m["fold"], m["seed"]): m["share"] for m in PLAN.matched}
    assert len(shares) == 4 * (2 * 2 * 3 + 3)
    for i in chosen(PLAN, site="ffn_neuron", control="matched"):
        if i.ranking == "per_relation":
            continue
        (target,) = chosen(PLAN, site=i.site, size=i.size, ranking=i.ranking, fold=i.fold, control="none")
        assert len(set(i.units)) == len(target.units)
        assert not set(i.units) & set(target.units)
        assert Counter(layer_kind[u] for u in i.units) == Counter(layer_kind[u] for u in target.units)
        wanted = Counter((layer_kind[u], cells[u]) for u in target.units)
        exact = (wanted & Counter((layer_kind[u], cells[u]) for u in i.units)).total()
        assert shares[i.size, i.ranking, i.fold, i.seed] == pytest.approx(exact / len(i.units))
        if i.size == "0.1%":
            assert exact == len(i.units)
    assert min(shares.values()) < 1  # cells were exhausted, too
    seeds = [tuple(i.units) for i in chosen(PLAN, site="ffn_neuron", control="matched", size="3%", ranking="abs")]
    assert len(set(seeds)) == len(seeds) == 6


def matched(units, stratum, cells, magnitude, seed):
    return selection.matched_units(np.array(units), stratum, cells, magnitude, np.random.default_rng(seed))


def test_an_exhausted_cell_is_filled_from_the_nearest():
    """One stratum; the set is all but one of cell (4, 4), whose neighbours are few."""
    cells = np.array([(4, 4)] * 3 + [(4, 5)] + [(6, 4)] * 2 + [(0, 0)] * 5 + [(4, 4)])
    stratum, magnitude = np.zeros(len(cells), dtype=np.int64), np.zeros(len(cells))
    for seed in range(20):
        units, share = matched([0, 1, 2], stratum, cells, magnitude, seed)
        assert {11, 3} <= set(units)  # the one that is left in the cell, and the one at distance 1
        assert set(units) - {11, 3} <= {4, 5}
        assert share == pytest.approx(1 / 3)
    assert matched(range(7), stratum, cells, magnitude, 0) is None


@pytest.mark.parametrize("axis", [0, 1])
def test_nearest_cells_differ_least_in_both_deciles(axis):
    """Unit 0 has nobody in its cell; of two that are like it in one decile, the one that is nearer in the other."""
    cells = np.array([(5, 5), (5, 8), (5, 6), (3, 4)])[:, [axis, 1 - axis]]
    for seed in range(10):
        units, _ = matched([0], np.zeros(4, dtype=np.int64), cells, np.zeros(4), seed)
        assert units.tolist() == [2]


def test_controls_are_drawn_among_the_nearest_in_magnitude():
    """Three of the tail of their cell: the three stand-ins are any of the six largest others, all of them in turn."""
    magnitude = np.concatenate([[30.0, 31.0, 32.0], np.arange(20.0), [31.0, 31.0]])
    stratum = np.repeat([0, 1], [23, 2])  # the last two are nearest, but in another layer
    cells = np.full((25, 2), 9)
    counts = Counter()
    for seed in range(400):
        units, share = matched([0, 1, 2], stratum, cells, magnitude, seed)
        assert (len(set(units)), share) == (3, 1)
        counts.update(units)
    assert set(counts) == set(range(17, 23))
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
    # in the middle of a cell it is the nearest on both sides
    inside = {u for seed in range(50) for u in matched([13], stratum, cells, magnitude, seed)[0]}
    assert inside == {12, 14}


def test_the_last_ring_of_cells_is_drawn_by_magnitude_too():
    """Nobody else in the cell, one at distance 1, six at distance 2: always the one, and of the six the nearest two."""
    cells = np.array([(5, 5), (5, 5), (5, 6), *[(5, 7)] * 3, *[(4, 4)] * 3])
    magnitude = np.array([4.0, 6.0, 99.0, 5.1, 0.0, 9.0, 5.2, 1.0, 8.0])
    drawn = {tuple(matched([0, 1], np.zeros(9, dtype=np.int64), cells, magnitude, seed)[0]) for seed in range(50)}
    assert drawn == {(2, 3), (2, 6)}


def test_the_ratio_of_magnitudes_is_that_of_the_means():
    """Scores that follow the magnitude: the selection is the tail, the ratio is above 1 and below a random draw's."""
    neurons = FRAMES["ffn_neurons"].with_columns(importance=pl.col("magnitude") / 10)
    rows = neurons.sort(PLAN.index["ffn_neuron"].columns, nulls_last=True)["magnitude"].to_list()
    plan = selection.plan({"heads": FRAMES["heads"], "ffn_neurons": neurons}, ROWS, seeds=4)
    assert len(plan.matched) == 4 * 4
    for entry in plan.matched:
        where = {"site": "ffn_neuron", "size": entry["size"], "ranking": "signed", "fold": None}
        (ours,) = chosen(plan, control="none", seed=None, **where)
        (control,) = chosen(plan, control="matched", seed=entry["seed"], **where)
        mean = [sum(rows[u] for u in one.units) / len(one.units) for one in (ours, control)]
        assert entry["magnitude_ratio"] == pytest.approx(mean[0] / mean[1])
        assert 1 < entry["magnitude_ratio"] < mean[0] / np.mean(rows)
    silent = {"heads": FRAMES["heads"], "ffn_neurons": neurons.with_columns(magnitude=pl.lit(0.0))}
    assert {entry["magnitude_ratio"] for entry in selection.plan(silent, ROWS, seeds=1).matched} == {None}


def test_matched_heads_stay_in_their_layers():
    layer = PLAN.index["head"]["layer"].to_list()
    for i in chosen(PLAN, site="head", control="matched", ranking="signed"):
        (target,) = chosen(PLAN, site="head", size=i.size, ranking="signed", fold=i.fold, control="none")
        assert Counter(layer[u] for u in i.units) == Counter(layer[u] for u in target.units)
        assert not set(i.units) & set(target.units)


def test_the_folds_draw_their_controls_apart():
    """One head leads in both folds; its stand-ins are not the same ones."""
    heads = FRAMES["heads"].with_columns(
        lpi=pl.when(pl.col("head") == 0, pl.col("layer") == 1).then(9.0).otherwise("lpi").cast(pl.Float32)
    )
    plan = selection.plan({**FRAMES, "heads": heads}, ROWS, seeds=20)
    first, second = (
        [i.units.tolist() for i in chosen(plan, site="head", size="1", control="matched", fold=fold)] for fold in (0, 1)
    )
    assert first != second
    assert {u for units in first for u in units} == {HEADS + 1, HEADS + 2, HEADS + 3, HEADS + 4}


def test_no_control_rather_than_half_a_control():
    """Ten of fifteen heads: a layer has too few others, so that no fold and no seed of that size is matched."""
    assert not chosen(PLAN, site="head", size="10", control="matched")
    assert [left for left in PLAN.left_out if "matched" in left] == [
        f"head 10, {r}, matched control: too few others in a layer" for r in selection.RANKINGS
    ]


def test_a_size_that_is_everything_is_left_out():
    frames = {**FRAMES, "heads": FRAMES["heads"].filter(pl.col("head") < 3)}
    plan = selection.plan(frames, ROWS)
    assert not chosen(plan, site="head", size="10")
    assert "head 10: there are 9 in all" in plan.left_out


@pytest.mark.parametrize("why", ["no groups", "one fold"])
def test_without_groups_there_is_no_cross_fit_of_neurons(why):
    """Heads are known prompt by prompt; matched controls then accompany what selection there is."""
    frames, rows = dict(FRAMES), ROWS
    if why == "no groups":
        del frames["ffn_groups"]
    else:
        rows = ROWS.with_columns(pl.col("group") % 5)
    plan = selection.plan(frames, rows, seeds=2)
    assert {i.fold for i in chosen(plan, site="ffn_neuron")} == {None}
    assert len(chosen(plan, site="ffn_neuron", size="1%", control="matched", fold=None)) == 2
    assert {i.fold for i in chosen(plan, site="head")} == ({None, 0, 1} if why == "no groups" else {None})
    assert any("cross-fit" in left for left in plan.left_out)


def test_the_sample_holds_equally_many_of_each_stratum():
    table = tables(kinds=("routed", "shared"), width=100)[0]["ffn_neurons"]
    found = selection.sample(table, 300, seed=1)
    assert len(found) == 300
    assert found["active"].min() > 0
    alive = table.filter(pl.col("active") > 0)
    strata = Counter()
    for key, part in alive.partition_by("layer", "kind", as_dict=True).items():
        cells = part.with_columns(decile=decile(part["importance"].abs().to_numpy()))
        strata.update((*key, d) for d in found.join(cells, on=part.columns, nulls_equal=True)["decile"])
    assert len(strata) == LAYERS * 2 * 10
    assert set(strata.values()) == {5}
    assert found.equals(selection.sample(table.sample(fraction=1, shuffle=True, seed=3), 300, seed=1))
    assert not found.equals(selection.sample(table, 300, seed=2))
    extra = Counter(selection.sample(table, 310, seed=1).group_by("layer", "kind").len()["len"])
    assert sum(size * n for size, n in extra.items()) == 310


def test_a_small_stratum_gives_all_it_has():
    table = tables(width=40)[0]["ffn_neurons"].with_columns(pl.col("active") + 1)  # 20 routed, 4 shared in a stratum
    found = selection.sample(table, 3 * 10 * (4 + 9))
    assert Counter(found["kind"]) == {"shared": 3 * 40, "routed": 3 * 10 * 9}
    assert len(selection.sample(table, 10**6)) == len(table)


def test_other_tables_are_refused():
    for frames, message in (
        ({k: v for k, v in FRAMES.items() if k != "heads"}, "table heads is missing"),
        (
            {**FRAMES, "heads": FRAMES["heads"].filter(pl.col("prompt_id") != "r0/00")},
            "not the scores of these prompts",
        ),
        ({**FRAMES, "ffn_groups": FRAMES["ffn_groups"].head(5)}, "not the neurons of ffn_neurons"),
    ):
        with pytest.raises(SelectionError, match=message):
            selection.plan(frames, ROWS)
    with pytest.raises(SelectionError, match="ranking 'best' is unknown"):
        selection.plan(FRAMES, ROWS, ("best",))


def test_row_order_of_the_tables_does_not_matter():
    shuffled = {name: frame.sample(fraction=1, shuffle=True, seed=2) for name, frame in FRAMES.items()}
    again = selection.plan(shuffled, ROWS, selection.RANKINGS, seeds=3)
    for one, two in itertools.zip_longest(PLAN.interventions, again.interventions):
        assert np.array_equal(one.units, two.units)
        assert np.array_equal(one.prompts, two.prompts)
    assert math.isclose(sum(m["share"] for m in PLAN.matched), sum(m["share"] for m in again.matched))
