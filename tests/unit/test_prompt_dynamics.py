"""Shares and overlaps within prompts, against loops over prompts with all scores at hand, and planted answers."""

import math

import numpy as np
import polars as pl
import pytest

from moescope.dynamics import DynamicsError
from moescope.prompt_dynamics import means, prompt_dynamics, summary
from moescope.statistics import SubjectBootstrap
from tests.unit.neuron_tables import Model, prompt_table, random_routing

DENSE = Model(width=500, heads=3, head_width=40)
MIXTURE = Model(experts=8, width=60, shared=45)
PARTLY_DENSE = Model(layers=3, experts=8, width=60, dense=(0, 2))
FACTS = prompt_table(30)


def series(model, noise=0.5, prompts=FACTS, seed=0, reroute=1.0, **more):
    """Three checkpoints; the LPI [prompts, neurons] of both components behind each; and which neurons are active."""
    random = np.random.default_rng(seed)
    count = len(prompts)
    lasting = {c: random.standard_t(2, (count, len(getattr(model, c)))) for c in ("ffn", "attn")}
    routed = random_routing(random, count, model, 3) if model.experts else None
    checkpoints, scores, active = [], [], []
    for step in (0, 5, 20):
        lpi = {c: (x + noise * random.standard_t(2, x.shape)).astype(np.float32) for c, x in lasting.items()}
        if model.experts:
            other = random_routing(random, count, model, 3)
            routed = np.where(random.random((count, model.layers, 1)) < reroute, other, routed)
        active.append({"ffn": model.active(routed, count), "attn": np.ones(lpi["attn"].shape, dtype=bool)})
        checkpoints.append(model.checkpoint(step, prompts, lpi["ffn"], lpi["attn"], routed, **more))
        scores.append(lpi)
    return checkpoints, scores, active


def best(values, members, size):
    return set(sorted(members, key=lambda i: (-values[i], i))[:size])


def exact(values, members):
    """What the members count that are exactly 1% of them: the last one in part."""
    size = math.ceil(len(members) / 100)
    order = sorted(members, key=lambda i: (-values[i], i))[:size]
    return dict.fromkeys(order, 1.0) | {order[-1]: len(members) / 100 - (size - 1)}


@pytest.mark.parametrize("model", [DENSE, MIXTURE, PARTLY_DENSE])
@pytest.mark.parametrize("component", ["ffn", "attn"])
def test_every_prompt_equals_a_loop_over_all_its_neurons(model, component):
    checkpoints, scores, active = series(model)
    table = prompt_dynamics(checkpoints, FACTS).filter(component=component, step=20)
    assert table["step_from"].unique().to_list() == [5]
    place = {name: i for i, name in enumerate(FACTS["prompt_id"])}
    unknown = 0
    for name, share, effective, overlap in table.select("prompt_id", pl.selectors.float()).iter_rows():
        p = place[name]
        before, after = scores[1][component][p].astype(float), scores[2][component][p].astype(float)
        members = np.flatnonzero(active[2][component][p]).tolist()
        positive = {i: after[i] for i in members if after[i] > 1e-7}
        total = sum(positive.values())
        top = exact(after, members)
        assert share == pytest.approx(sum(w * positive.get(i, 0.0) for i, w in top.items()) / total, rel=1e-5)
        entropy = -sum(x / total * math.log(x / total) for x in positive.values())
        assert effective == pytest.approx(math.exp(entropy) / len(members), rel=1e-5)
        both = [i for i in members if active[1][component][p][i]]
        size = math.ceil(len(both) / 100)
        listed = [
            best(abs(x), np.flatnonzero(now[component][p]).tolist(), math.ceil(now[component][p].sum() / 50))
            for x, now in ((before, active[1]), (after, active[2]))
        ]
        if min(len(one & set(both)) for one in listed) < size:
            unknown += 1
            assert overlap is None
            continue
        a, b = (exact(abs(x), both) for x in (before, after))
        weights = np.array([(a.get(i, 0.0), b.get(i, 0.0)) for i in a | b])
        assert overlap == pytest.approx(weights.min(axis=1).sum() / weights.max(axis=1).sum())
    assert unknown < 20
    assert (unknown > 0) == (model is not DENSE and component == "ffn")


def test_equal_neurons_are_all_effective_and_hold_one_percent():
    lpi = np.full((30, 1000), 0.01)
    table = prompt_dynamics([DENSE.checkpoint(3, FACTS, lpi, np.ones((30, 240)))], FACTS).filter(component="ffn")
    assert table["effective_share"].to_list() == pytest.approx([1.0] * 30)
    assert table["positive_share"].to_list() == pytest.approx([0.01] * 30)
    assert table["jaccard"].null_count() == table["step_from"].null_count() == 30


def test_one_neuron_holds_everything_and_nothing_positive_is_no_share():
    lpi = np.full((30, 1000), -0.01)
    lpi[:, 77] = 0.5
    lpi[4] = -0.5
    lpi[:, 5] = 9e-8  # too small to count
    table = prompt_dynamics([DENSE.checkpoint(3, FACTS, lpi)], FACTS).filter(component="ffn")
    without = FACTS["prompt_id"][4]
    held = table.filter(pl.col("prompt_id") != without)
    assert held["positive_share"].to_list() == pytest.approx([1.0] * 29)
    assert held["effective_share"].to_list() == pytest.approx([1 / 1000] * 29)
    assert table.filter(prompt_id=without).select("positive_share", "effective_share").row(0) == (None, None)
    counts = summary(table, FACTS, {3: 12}).filter(metric="positive_share")
    assert counts.select("prompts", "left_out", "tokens").unique().row(0) == (29, 1, 12)


def test_routing_that_changes_entirely_leaves_only_what_is_always_active():
    """Prompts go from experts 0-2 to 3-5: the shared 2 x 45 neurons are active at both, of which the top 1% is one."""
    random = np.random.default_rng(2)
    experts = [np.broadcast_to(np.arange(3) + shift, (30, 2, 3)) for shift in (0, 3)]
    shared = np.flatnonzero((MIXTURE.ffn["kind"] == "shared").to_numpy())
    scores = []
    for place in (shared[8], shared[8], shared[9]):
        lpi = random.normal(size=(30, len(MIXTURE.ffn)))
        lpi[:, place] = 50.0
        scores.append(lpi)
    at = zip((0, 1, 2), scores, (experts[0], experts[1], experts[1]), strict=True)
    table = prompt_dynamics([MIXTURE.checkpoint(s, FACTS, x, routed=r) for s, x, r in at], FACTS)
    ffn = table.filter(component="ffn")
    assert ffn.filter(step=1)["jaccard"].to_list() == pytest.approx([1.0] * 30)
    # active at both are now 360 + 90 neurons, the top 1% is four and a half; that of the shared one is lost
    known = ffn.filter(step=2)["jaccard"].drop_nulls()
    assert len(known) == 30
    assert known.max() <= 3.5 / 5.5 + 1e-9


def test_identical_checkpoints_overlap_whole():
    checkpoints, _, _ = series(MIXTURE)
    table = prompt_dynamics([checkpoints[0], checkpoints[0]._replace(step=9)], FACTS)
    assert table.filter(step=9)["jaccard"].to_list() == pytest.approx([1.0] * 60)


def test_means_have_bootstrap_intervals_over_subjects_and_count_what_they_leave_out():
    checkpoints, _, _ = series(MIXTURE)
    table = prompt_dynamics(checkpoints, FACTS)
    rows = summary(table, FACTS, {0: 7}, seed=3).filter(component="ffn")
    assert set(rows["population"]) == {"prompt"}
    assert rows.filter(step=0)["tokens"].unique().to_list() == [7]
    assert rows.filter(step=5)["tokens"].null_count() == len(rows.filter(step=5))
    own = table.filter(component="ffn", step=20).join(FACTS, on="prompt_id", maintain_order="left")
    known = own.drop_nulls("jaccard")
    found = rows.filter(metric="jaccard", step=20, average="micro").row(0, named=True)
    assert (found["prompts"], found["left_out"]) == (len(known), 30 - len(known))
    assert 0 < found["left_out"] < 20
    assert found["value"] == pytest.approx(known["jaccard"].mean())
    macro = rows.filter(metric="jaccard", step=20, average="macro")["value"].item()
    assert macro == pytest.approx(known.group_by("relation").agg(pl.col("jaccard").mean())["jaccard"].mean())
    bootstrap = SubjectBootstrap.draw(FACTS["subject"], 3)
    weights = bootstrap.counts[:, bootstrap.positions(known["subject"].to_list())]
    drawn = weights @ known["jaccard"].to_numpy() / weights.sum(axis=1)
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(drawn[1:], [2.5, 97.5]).tolist())
    assert rows.filter(metric="jaccard")["step"].min() == 5
    of_ffn = [
        mean for mean in means(table, FACTS, 3) if (mean.component, mean.metric, mean.step) == ("ffn", "jaccard", 20)
    ]
    assert of_ffn[0].sums.draws()[:, 0] == pytest.approx(drawn)
    worst = [m for m in means(table, FACTS, 3, 0.0) if (m.component, m.metric, m.step) == ("ffn", "jaccard", 20)]
    weights = bootstrap.counts[:, bootstrap.positions(own["subject"].to_list())]
    drawn = weights @ own["jaccard"].fill_null(0.0).to_numpy() / weights.sum(axis=1)
    assert worst[0].sums.draws()[:, 0] == pytest.approx(drawn)
    assert (worst[0].prompts, worst[0].left_out) == (len(known), 30 - len(known))


def test_without_lists_only_the_effective_share_is_known():
    checkpoints, _, _ = series(DENSE, without=("top_active",))
    table = prompt_dynamics(checkpoints, FACTS)
    assert table["effective_share"].null_count() == 0
    assert table.select("positive_share", "jaccard").null_count().row(0) == (len(table),) * 2
    found = summary(table, FACTS, {}).filter(metric="jaccard", step=5, component="ffn")
    assert found.select("value", "prompts", "left_out").unique().row(0) == (None, 0, 30)


def replaced(checkpoint, name, change):
    def table(asked, columns):
        frame = checkpoint.table(asked, columns)
        return change(frame) if asked == name else frame

    return checkpoint._replace(table=table)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("top_active", lambda f: f[360:], "top_active lists too few neurons"),
        ("routing", lambda f: f[60:], "routing and active_sums differ"),
        ("active_sums", lambda f: f[2:], "active_sums does not hold the prompts"),
        ("routing", lambda f: f.with_columns(pl.col("prompt_id") + "x"), "prompt r.*x is not in prompts.parquet"),
    ],
)
def test_torn_tables_are_named(name, change, message):
    checkpoints, _, _ = series(MIXTURE)
    with pytest.raises(DynamicsError, match=f"step 0: {message}.*delete this step's results and run again"):
        prompt_dynamics([replaced(checkpoints[0], name, change)], FACTS)


def test_other_neurons_and_other_prompts_are_refused():
    (first, *_), _, _ = series(DENSE)
    (_, second, _), _, _ = series(Model(width=501, heads=3, head_width=40))
    with pytest.raises(DynamicsError, match="steps 0 and 5: not the same ffn neurons"):
        prompt_dynamics([first, second], FACTS)
    with pytest.raises(DynamicsError, match="no checkpoint"):
        prompt_dynamics([], FACTS)
    table = prompt_dynamics([first], FACTS)
    with pytest.raises(DynamicsError, match="is not in prompts"):
        summary(table, FACTS[1:], {})
