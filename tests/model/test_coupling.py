"""Pairs of a head and an expert, against heads zeroed in copies, experts added by hand and paths integrated by hand."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from torch import nn

from moescope import clean, coupling, expert_ablation, expert_sets, passes, precision, replay, tables
from moescope.interventions import InterventionError
from moescope.pairs import Pair, PairError
from tests.model import by_prompt, models, references

KEY = list(tables.SCHEMAS["expert_interventions"].key)
SEEDS = 2
FOLDS = {0: range(5), 1: range(5, 10)}


@dataclass(eq=False)
class Case:
    """A model, its clean run, and everything about some pairs."""

    name: str
    model: nn.Module
    run: clean.CleanRun
    tested: list[coupling.Tested]
    table: pl.DataFrame
    gates: pl.DataFrame
    gradients: pl.DataFrame

    @functools.cached_property
    def alone(self) -> list[by_prompt.Seen]:
        return [by_prompt.run(self.model, target.tokens) for target in self.run.targets]

    @functools.cached_property
    def row(self) -> dict[str, int]:
        return {prompt: p for p, prompt in enumerate(self.run.prompts["prompt_id"])}

    @functools.cache  # noqa: B019
    def without(self, layer: int, head: int) -> nn.Module:
        return by_prompt.without_head(self.model, layer, head)

    @functools.cache  # noqa: B019
    def suppressed(self, layer: int, head: int, p: int) -> by_prompt.Seen:
        return by_prompt.run(self.without(layer, head), self.run.targets[p].tokens)

    def fold(self, fold: int | None) -> set[str]:
        groups = self.run.prompts.select("prompt_id", "group").rows()
        return {prompt for prompt, group in groups if fold is None or group in FOLDS[fold]}


def start(name: str) -> tuple[nn.Module, clean.CleanRun]:
    model = by_prompt.build(name, experts=6, slots=2)
    return model, clean.CleanRun.of(model, models.tokenizer(), by_prompt.prompts())


def pair_on(run: clean.CleanRun, pair: tuple[int, int, int, int], fold: int | None) -> coupling.Tested:
    inside = np.array([fold is None or group in FOLDS[fold] for group in run.prompts["group"]])
    return coupling.Tested(Pair(*pair), inside, fold)


def popular(run: clean.CleanRun, layer: int, but: int = -1) -> int:
    """The expert that is used at most last positions."""
    counts = run.trace.layers[layer].index.flatten().bincount(minlength=6)
    counts[but if but >= 0 else []] = 0
    return int(counts.argmax())


def follow(run: clean.CleanRun, tested: list[coupling.Tested], seeds: int = SEEDS) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The tables ``expert_interventions`` and ``gates``."""
    labels = expert_sets.parts(run.prompts)[1]
    routing, _ = passes.clean_routing(run, replay.by_length(run, labels.tolist()))
    found = expert_ablation.Interventions(run)
    expert_ablation.add_clean(found, run)
    with replay.sparing(run.decomposition) as distinct:
        again = passes.Passes(run, distinct, labels)
        again.error()
        gates = coupling.suppress_and_force(found, again, routing, tested, seeds)
    return found.table().filter(pl.col("experiment") != "clean"), gates


@functools.cache
def case(name: str) -> Case:
    """Two pairs share a head, one of them tested on both folds; one lies in the last layer; given in no order."""
    with torch.no_grad():
        model, run = start(name)
        with precision.computing_in_float32(model):
            first = min(by_prompt.blocks(model))
            one, two = popular(run, 2), popular(run, first)
            pairs = [
                ((2, 3, 2, popular(run, 2, one)), 1),
                ((0, 1, 2, one), 1),
                ((0, 1, first, two), 0),
                ((0, 1, 2, one), 0),
            ]
            tested = [pair_on(run, pair, fold) for pair, fold in pairs]
            return Case(name, model, run, tested, *follow(run, tested), coupling.integrated_gradients(run, tested))


def near(rows: pl.DataFrame, score: by_prompt.Score) -> None:
    (log_prob,), (rank,) = rows["log_prob"], rows["rank"]
    assert log_prob == pytest.approx(score.log_prob, abs=2e-4)
    assert rank in score.ranks


@pytest.mark.parametrize("name", by_prompt.FAMILIES)
def test_suppression_against_copied_models(name):
    """What is left of every prompt without the pair's head, and without others of its layer."""
    it, moved = case(name), 0
    rows = it.table.filter(pl.col("experiment") == "suppression")
    expected = 0
    for one in it.tested:
        of_pair = rows.filter(pl.col("mode") == one.pair.label, pl.col("fold") == one.fold)
        heads = of_pair.select("control", "seed", "head", "layer").unique().sort("control", "seed").rows()
        assert [(*row[:2], row[3]) for row in heads] == [
            ("none", None, one.pair.head_layer),
            *(("random", seed, one.pair.head_layer) for seed in range(SEEDS)),
        ]
        (own, *others) = [head for _, _, head, _ in heads]
        assert own == one.pair.head
        assert len({own, *others}) == 1 + SEEDS
        assert set(others) < set(range(4))
        for control, seed, head, layer in heads:
            for prompt in it.fold(one.fold):
                its = pl.col("prompt_id") == prompt, pl.col("control") == control, pl.col("seed").eq_missing(seed)
                p = it.row[prompt]
                near(of_pair.filter(*its), it.suppressed(layer, head, p).score(int(it.run.target[p])))
                moved += (it.suppressed(layer, head, p).logits - it.alone[p].logits).abs().max() > 1e-2
                expected += 1
    assert len(rows) == expected
    assert moved > expected / 2, "the case must arise: heads that matter"
    assert says_nothing_else(rows, "layer", "head")


def says_nothing_else(rows: pl.DataFrame, *names: str) -> bool:
    """Columns that belong to other experiments are null."""
    said = {"experiment", "mode", "fold", "control", "seed", *names, "prompt_id", "rank", "log_prob"}
    return all(column.null_count() == len(column) for column in rows.drop(said))


@pytest.mark.parametrize("name", by_prompt.FAMILIES)
def test_gates_against_routers_of_copied_models(name):
    """All later layers at the last position: of the clean top K together, and of the pair's expert in its layer."""
    it, expected = case(name), {}
    heads = it.table.filter(pl.col("experiment") == "suppression")
    for row in heads.select("mode", "fold", "control", "seed", "head", "layer", "prompt_id").iter_rows(named=True):
        pair, p = Pair.of(row["mode"]), it.row[row["prompt_id"]]
        broken = it.suppressed(row["layer"], row["head"], p)
        for layer in by_prompt.blocks(it.model):
            if layer < pair.head_layer:
                continue
            before, after = (by_prompt.probability(name, seen.router[layer][-1]) for seen in (it.alone[p], broken))
            chosen = it.alone[p].index[layer][-1]
            key = pair.head_layer, pair.head, row["control"], row["seed"], row["prompt_id"], layer
            expected[*key, None] = before[chosen].sum().item(), after[chosen].sum().item()
            if layer == pair.layer:
                expected[*key, pair.expert] = before[pair.expert].item(), after[pair.expert].item()
    found = {row[:7]: row[7:] for row in it.gates.iter_rows()}
    assert len(found) == len(it.gates)
    assert found.keys() == expected.keys()
    for key, values in found.items():
        assert values == pytest.approx(expected[key], abs=2e-5), key
    assert sum(abs(a - b) > 1e-2 for a, b in expected.values()) > len(expected) / 4, "the case must arise"


def forced(it: Case, pair: Pair, number: int, p: int) -> by_prompt.Score:
    """A prompt without the head, where an expert has the weight at every position that the pair's had in the clean run,
    or would have had beside those chosen."""
    rule, seen, model = references.RULES[it.name], it.alone[p], it.without(pair.head_layer, pair.head)
    probability = by_prompt.probability(it.name, seen.router[pair.layer])
    total = probability.gather(1, seen.index[pair.layer]).sum(1) if rule.normalised else 1.0
    weight = probability[:, pair.expert] * rule.scale / total
    for position, (index, used) in enumerate(zip(seen.index[pair.layer], seen.weight[pair.layer], strict=True)):
        for e, w in zip(index.tolist(), used.tolist(), strict=True):
            assert e != pair.expert or weight[position].item() == pytest.approx(w, abs=1e-5)

    def add(experts: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        hidden, index, used = args
        already = (used * (index == number)).sum(1)
        CASES.update({bool(there) for there in (index == number).any(1)})
        return out + (weight - already)[:, None] * by_prompt.expert(experts, number, hidden)

    hook = by_prompt.blocks(model)[pair.layer].experts.register_forward_hook(add)
    score = by_prompt.run(model, it.run.targets[p].tokens).score(int(it.run.target[p]))
    hook.remove()
    return score


#: Whether the expert that is forced was chosen anyway.
CASES: set[bool] = set()


@pytest.mark.parametrize("name", by_prompt.FAMILIES)
def test_forcing_against_adding_the_expert(name):
    it, expected, moved = case(name), 0, 0
    CASES.clear()
    rows = it.table.filter(pl.col("experiment") == "forcing")
    for one in it.tested:
        of_pair = rows.filter(pl.col("mode") == one.pair.label, pl.col("fold") == one.fold)
        experts = of_pair.select("control", "seed", "expert", "head", "layer").unique().sort("control", "seed").rows()
        assert [(control, seed) for control, seed, *_ in experts] == [("none", None), ("random", 0), ("random", 1)]
        own, *others = [e for _, _, e, _, _ in experts]
        assert own == one.pair.expert
        assert len({own, *others}) == 1 + SEEDS
        assert set(others) < set(range(6))
        assert {(head, layer) for *_, head, layer in experts} == {(one.pair.head, one.pair.layer)}
        for control, seed, e, _, _ in experts:
            for prompt in it.fold(one.fold):
                its = pl.col("prompt_id") == prompt, pl.col("control") == control, pl.col("seed").eq_missing(seed)
                score, p = forced(it, one.pair, e, it.row[prompt]), it.row[prompt]
                near(of_pair.filter(*its), score)
                broken = it.suppressed(one.pair.head_layer, one.pair.head, p).score(int(it.run.target[p]))
                moved += abs(score.log_prob - broken.log_prob) > 1e-3
                expected += 1
    assert len(rows) == expected
    assert moved > expected / 3, "the case must arise: experts that matter"
    assert {True, False} == CASES, "the case must arise: experts that were chosen, and that were not"
    assert says_nothing_else(rows, "layer", "head", "expert")


def test_controls_are_the_same_for_pairs_that_share_a_head_and_no_more_than_there_are():
    with torch.no_grad():
        _, run = start("olmoe")
        tested = [pair_on(run, (1, 2, 2, e), None) for e in (0, 5)]
        table, gates = follow(run, tested, seeds=5)
        for part in (table, gates):
            assert set(part["prompt_id"]) == set(run.prompts["prompt_id"])
        heads = table.filter(pl.col("experiment") == "suppression").select("control", "seed", "head").unique()
        assert len(heads) == 4
        assert set(heads["head"]) == set(range(4))
        assert heads.filter(pl.col("control") == "none")["head"].to_list() == [2]
        experts = table.filter(pl.col("experiment") == "forcing").group_by("mode").agg(pl.col("expert").unique())
        assert all(sorted(found) == list(range(6)) for found in experts["expert"])
        assert set(gates.filter(pl.col("gate_layer") == 2)["expert"]) == {None, 0, 5}
        assert set(gates.filter(pl.col("gate_layer") == 1)["expert"]) == {None}
        again, same = follow(run, tested[::-1], seeds=5)
        assert_frame_equal(table, again)
        assert_frame_equal(gates, same, abs_tol=1e-6)


def test_no_pair_no_rows():
    with torch.no_grad():
        _, run = start("olmoe")
        table, gates = follow(run, [])
        assert len(table) == len(gates) == len(coupling.integrated_gradients(run, [])) == 0


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        ((2, 0, 1, 0), PairError, "head 0 of layer 2 lies after expert 0 of layer 1"),
        ((0, 4, 2, 0), InterventionError, "layer 0 has no head 4"),
        ((3, 0, 3, 0), InterventionError, "layer 3"),
        ((0, 1, 2, 6), InterventionError, "experts go from 0 to 5"),
        ((0, 1, 1, 2), InterventionError, "layer 1, routed"),
    ],
)
def test_a_pair_that_is_not_there_is_an_error(pair, error, message):
    """In a model whose second layer does not route."""
    with torch.no_grad():
        model, run = start("qwen2_moe")
        with pytest.raises(error, match=message):
            follow(run, [pair_on(run, pair, None)])
        assert by_prompt.untouched(model)


def test_weights_come_back():
    """Bit by bit, after everything."""
    with torch.no_grad():
        model, run = start("qwen2_moe")
        before = [(p, p.data_ptr(), p.clone()) for p in model.parameters()]
        tested = [pair_on(run, (0, 1, 2, 3), None)]
        follow(run, tested)
        coupling.integrated_gradients(run, tested, steps=4)
    assert all(p.data_ptr() == at and torch.equal(p, x) and p.grad is None for p, at, x in before)
    assert by_prompt.untouched(model)


# ---- integrated gradients ------------------------------------------------------------------------------------------


def shares(it: Case, route: tuple[int, int, int], p: int) -> tuple[torch.Tensor, float, float]:
    """What the table says of a route: attribution of the heads [4], of the rest, and the gap."""
    layer, later, e = route
    rows = it.gradients.filter(
        pl.col("prompt_id") == it.run.prompts["prompt_id"][p],
        pl.col("head_layer") == layer,
        pl.col("layer") == later,
        pl.col("expert") == e,
    )
    heads = rows.filter(pl.col("head").is_not_null()).sort("head")
    assert heads["head"].to_list() == [0, 1, 2, 3]
    (gap,) = rows["gap"].unique()
    (rest,) = rows.filter(pl.col("head").is_null())["attribution"]
    return torch.tensor(heads["attribution"].to_list(), dtype=torch.float64), rest, gap


def same_layer(it: Case) -> tuple[int, int, int]:
    pair = next(one.pair for one in it.tested if one.pair.head_layer == one.pair.layer)
    return pair.head_layer, pair.layer, pair.expert


@pytest.mark.parametrize("name", by_prompt.FAMILIES)
def test_a_route_within_a_layer_against_an_integral_by_hand(name):
    """softmax or sigmoid of W norm(x + O heads) in float64, by 2,000 midpoints."""
    it = case(name)
    layer, _, e = route = same_layer(it)
    block = it.model.model.layers[layer]
    o, w = block.self_attn.o_proj.weight.detach().double(), block.mlp.gate.weight.detach().double()
    gain, eps = block.post_attention_layernorm.weight.detach().double(), block.post_attention_layernorm.variance_epsilon
    assert block.self_attn.o_proj.bias is None
    (fold,) = {one.fold for one in it.tested if (one.pair.head_layer, one.pair.layer, one.pair.expert) == route}
    for prompt in it.fold(fold):
        p = it.row[prompt]
        x, heads = it.alone[p].hidden[layer][-1].double(), it.alone[p].heads[layer][-1].double()

        def f(alpha, x=x, heads=heads, leaf=None):
            h = x + (alpha * heads if leaf is None else leaf) @ o.T
            h = h * (h.square().mean(-1, keepdim=True) + eps).rsqrt() * gain
            return by_prompt.probability(name, h @ w.T)[..., e]

        leaf = (((torch.arange(2000) + 0.5) / 2000)[:, None] * heads).requires_grad_()
        (slope,) = torch.autograd.grad(f(None, leaf=leaf).sum(), leaf)
        truth = (slope.mean(0) * heads).view(4, -1).sum(1)
        found, rest, gap = shares(it, route, p)
        assert (found - truth).abs().max() < 1e-4
        assert rest == pytest.approx(f(torch.zeros(1)).item(), abs=1e-5)
        assert abs(gap) < 1e-5
        clean_probability = by_prompt.probability(name, it.alone[p].router[layer][-1])[e].item()
        assert found.sum().item() + rest - gap == pytest.approx(clean_probability, abs=1e-5)


@pytest.mark.parametrize("name", by_prompt.FAMILIES)
def test_a_route_over_later_layers_against_whole_passes(name):
    """The same nodes of the quadrature, each a whole pass of a float64 copy; the ends of the path too. Routers on the
    way choose otherwise along it, so that nothing but the same nodes gives the same sum."""
    it = case(name)
    pair = next(one.pair for one in it.tested if one.pair.layer == 2 and one.pair.head_layer == 0)
    exact = by_prompt.exact(it.model)
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(coupling.STEPS))
    alpha = torch.cat([torch.tensor([0.0, 1.0], dtype=torch.float64), (nodes + 1) / 2])
    read = []
    for p in (0, 5, 9):
        ids = torch.tensor([it.run.targets[p].tokens]).expand(len(alpha), -1)
        path = []

        def along(m, args, path=path):
            clean_heads = args[0][:, -1].detach()
            path.append((alpha[:, None] * clean_heads).requires_grad_())
            return (torch.cat([args[0][:, :-1].detach(), path[0][:, None]], 1),)

        said = lambda m, a, out, n=ids.shape: read.append(out[0].view(*n, -1)[:, -1])  # noqa: E731
        hooks = [exact.model.layers[0].self_attn.o_proj.register_forward_pre_hook(along)]
        hooks.append(exact.model.layers[2].mlp.gate.register_forward_hook(said))
        exact(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        f = by_prompt.probability(name, read[-1].double())[:, pair.expert]
        (slope,) = torch.autograd.grad(f.sum(), path[0])
        truth = ((weights[:, None] / 2 * slope[2:]).sum(0) * path[0][1].detach()).view(4, -1).sum(1)
        found, rest, gap = shares(it, (0, 2, pair.expert), p)
        assert (found - truth).abs().max() < 1e-4
        assert rest == pytest.approx(f[0].item(), abs=1e-5)
        clean_probability = by_prompt.probability(name, it.alone[p].router[2][-1])[pair.expert].item()
        assert f[1].item() == pytest.approx(clean_probability, abs=1e-5)
        assert gap == pytest.approx((truth.sum() - (f[1] - f[0])).item(), abs=1e-4)


@pytest.mark.parametrize("name", by_prompt.FAMILIES)
def test_gradients_hold_each_route_once_on_the_prompts_of_its_pairs(name):
    it = case(name)
    wanted = {
        (prompt, one.pair.head_layer, one.pair.layer, one.pair.expert, head)
        for one in it.tested
        for prompt in it.fold(one.fold)
        for head in (None, 0, 1, 2, 3)
    }
    rows = it.gradients.select("prompt_id", "head_layer", "layer", "expert", "head").rows()
    assert len(rows) == len(set(rows))
    assert set(rows) == wanted


def test_the_path_in_fewer_steps_and_in_parts(monkeypatch):
    """As many prompts and rows at once as fit changes nothing; a coarser quadrature leaves a larger gap."""
    with torch.no_grad():
        _, run = start("olmoe")
        tested = [pair_on(run, (1, 2, 1, 4), None)]
        whole, coarse = (coupling.integrated_gradients(run, tested, steps) for steps in (32, 1))
        monkeypatch.setattr(coupling, "_PROMPTS", 3)
        monkeypatch.setattr(coupling, "_ROWS", 5)
        parts = coupling.integrated_gradients(run, tested, 32)
    assert_frame_equal(whole, parts, abs_tol=1e-5)
    assert coarse["gap"].abs().mean() > 100 * whole["gap"].abs().mean()
