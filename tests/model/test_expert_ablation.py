"""Budgets and blocked experts against routers written by hand, one prompt at a time; and the experiments as a whole."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from torch import nn

from moescope import clean, experiments, expert_ablation, expert_sets, passes, precision, replay, tables
from moescope.expert_ablation import ExpertError
from moescope.interventions import InterventionError
from tests.model import by_prompt, models, references

KEY = list(tables.SCHEMAS["expert_interventions"].key)
METHOD, SEEDS = "summed_lpi", 1
LAST = 2
#: Families all of whose rows are compared; of the others, a few.
WHOLE = ["qwen2_moe", "glm4_moe"]
FAMILIES = ["olmoe", "olmoe_normed", "mixtral", *WHOLE]


def leading(model: nn.Module, grouped: bool) -> pl.DataFrame:
    """Ten experts per relation and fold at random, no more than three of one group; of one relation only three. Without
    groups, those of one relation leave too few others: all of one layer, and most of one layer in one fold."""
    random, layers, rows = np.random.default_rng(0), list(by_prompt.blocks(model)), []
    everyone = [(layer, e) for layer in layers for e in range(12)]
    for relation in ("capital0", "capital1", "language0", "language1"):
        for fold in (None, 0, 1):
            chosen = _spread([everyone[i] for i in random.permutation(len(everyone))])
            if relation == "language1" and not grouped:
                same = [(layers[0], int(e)) for e in random.permutation(12)]
                chosen = {None: same[:10], 0: chosen, 1: [*same[:7], *((layers[1], e) for e in (4, 9, 0))]}[fold]
            chosen = chosen[: 3 if relation == "capital1" else 10]
            rows += [(relation, METHOD, fold, rank, *one, 1.0) for rank, one in enumerate(chosen, 1)]
    return tables.of_rows(rows, "expert_importance")


def _spread(experts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    counts, chosen = {}, []
    for layer, e in experts:
        if counts.setdefault((layer, e // 6), 0) < 3:
            counts[layer, e // 6] += 1
            chosen.append((layer, e))
    return chosen[:10]


@dataclass
class Case:
    """A model, its clean run on the prompts, and everything that was found."""

    name: str
    model: nn.Module
    run: clean.CleanRun
    parts: list
    plan: list
    hits: dict
    clean: dict
    times: torch.Tensor
    groups: list
    table: pl.DataFrame
    left_out: list[str]

    @property
    def rule(self) -> references.Rule:
        return references.RULES[self.name]

    @property
    def shared(self) -> list[bool]:
        return [True, False] if self.name in WHOLE else [True]

    def choose(self, layer: int, z: torch.Tensor, blocked: list[int], how: str) -> list[dict[int, float]]:
        corrected = by_prompt.correction(by_prompt.blocks(self.model)[layer])
        return references.route(self.rule, z, corrected, 3, blocked, how)

    @functools.cached_property
    def alone(self) -> list[by_prompt.Seen]:
        """The prompts, each by itself."""
        return [by_prompt.run(self.model, target.tokens) for target in self.run.targets]

    def undisturbed(self, p: int) -> by_prompt.Score:
        return self.alone[p].score(int(self.run.target[p]))

    @functools.cached_property
    def broken(self) -> nn.Module:
        return by_prompt.without_shared(self.model)

    @functools.cached_property
    def known(self) -> dict:
        return {}

    def budget(self, p: int, mode: str, n: int, weights: str, shared: bool) -> by_prompt.Score:
        """One prompt where some slots of all routers are left."""
        ranks = {"top_n": [1, 2, 3][:n], "only_rank": [n], "drop_rank": [r for r in (1, 2, 3) if r != n]}[mode]

        def decide(layer: int, z: torch.Tensor) -> Iterator[dict[int, float]]:
            for choice in self.choose(layer, z, [], ""):
                ranked = sorted(choice, key=lambda e: -choice[e])
                left = [ranked[r - 1] for r in ranks]
                rest = sum(choice[e] for e in left)
                again = self.rule.normalised and weights == "family" and left
                yield {e: (w / rest * self.rule.scale if again else w) * (e in left) for e, w in choice.items()}

        key = self.run.targets[p].tokens, tuple(ranks), weights, shared
        return self._score(p, key, self.model if shared else self.broken, lambda layer, z: list(decide(layer, z)))

    def blocking(self, p: int, experts: tuple[tuple[int, int], ...], how: str) -> by_prompt.Score | None:
        """One prompt without some experts; None where a router would have to choose one of them all the same, at a
        position that somebody reads."""
        impossible = []

        def decide(layer: int, z: torch.Tensor) -> list[dict[int, float]]:
            blocked = [e for at, e in experts if at == layer]
            choice = self.choose(layer, z, blocked, how)
            read = choice[-1:] if layer == LAST else choice
            # its own among the three, or one of a group that lost the choice: nobody is left who could be chosen
            if how in ("reroute", "min_logit") and any(
                one.keys() & set(blocked) or (self.rule.groups and len({e // 6 for e in one}) > 1) for one in read
            ):
                impossible.append(layer)
            return choice

        key = self.run.targets[p].tokens, experts, how
        if key not in self.known:
            score = self._score(p, key, self.model, decide)
            self.known[key] = None if impossible else score
        return self.known[key]

    def _score(self, p: int, key: tuple, model: nn.Module, decide: by_prompt.Decide) -> by_prompt.Score:
        if key not in self.known:
            with by_prompt.routed_by(model, decide):
                self.known[key] = by_prompt.run(model, self.run.targets[p].tokens).score(int(self.run.target[p]))
        return self.known[key]


@functools.cache
def case(name: str) -> Case:
    model = by_prompt.build(name)
    with torch.no_grad(), precision.computing_in_float32(model):
        run = clean.CleanRun.of(model, models.tokenizer(), by_prompt.prompts())
        parts, labels = expert_sets.parts(run.prompts)
        groups = replay.by_length(run, labels.tolist())
        routing, times = passes.clean_routing(run, groups)
        found = expert_ablation.Interventions(run)
        expert_ablation.add_clean(found, run)
        with replay.sparing(run.decomposition) as distinct:
            again = passes.Passes(run, distinct, labels)
            again.error()
            shared = any(site.kind == "shared" for site in run.decomposition.sites)
            sizes = dict.fromkeys(expert_ablation.MODES, "all")
            budgets = expert_ablation.budgets(sizes, expert_ablation.WEIGHTS, expert_ablation.slots_of(run), shared)
            expert_ablation.add_budgets(found, again, budgets)
            hits = expert_ablation.hits(again, routing, times)
            importance = leading(model, grouped=references.RULES[name].groups is not None)
            plan, _ = expert_sets.plan(importance, METHOD, parts, hits, SEEDS)
            left_out = expert_ablation.add_blocking(found, again, plan, parts, expert_ablation.SEMANTICS, METHOD)
    table = found.table()
    return Case(name, model, run, parts, plan, hits, routing, times, groups, table, left_out)


def expected(it: Case) -> dict[tuple, Callable[[], by_prompt.Score | None]]:
    """What every row of the table must say, by its key, to be computed when it is asked for."""
    rows, whole = {}, it.run.prompts.select("prompt_id", "relation", "group").rows()

    def add(p: int, function: Callable, *args: object, **names: object) -> None:
        said = {"control": "none", **names, "prompt_id": whole[p][0]}
        assert rows.setdefault(tuple(said.get(column) for column in KEY), functools.partial(function, p, *args))

    for p, (_, relation, group) in enumerate(whole):
        fold = 0 if group < 5 else 1
        add(p, it.undisturbed, experiment="clean")
        for mode, sizes in {"top_n": (0, 1, 2, 3), "only_rank": (1, 2, 3), "drop_rank": (1, 2, 3)}.items():
            for n in sizes:
                for weights in ("family", "keep"):
                    for shared in it.shared:
                        names = {"mode": mode, "size": n, "weights": weights, "shared": shared}
                        add(p, it.budget, mode, n, weights, shared, experiment="budget", **names)
        for one in it.plan:
            for how in ("reroute", "reroute_logit", "min_logit", "zero_weight"):
                names = {"semantics": how, "size": one.size, "control": one.control, "seed": one.seed}
                if one.control != "random":
                    names |= {"importance": METHOD, "relation": relation}
                if one.folds:
                    names["fold"] = fold
                if (relation, fold) in one.sets and (how == "zero_weight" or relation not in crowded(one)):
                    add(p, it.blocking, one.sets[relation, fold], how, experiment="blocking", **names)
    return rows


def crowded(one: expert_sets.Blocked) -> set[str]:
    """Relations whose sets leave a router with fewer than three of its twelve experts."""
    layers = {part: [layer for layer, _ in chosen] for part, chosen in one.sets.items()}
    return {name for (name, _), of in layers.items() if any(of.count(layer) > 9 for layer in set(of))}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_table_against_routers_by_hand(name):
    """Log-probability and rank of every intervention and prompt, and no row else. Prompts of several relations run at
    once, each without the experts of its own. Where a router is left with too few, no prompt goes without that set."""
    it = case(name)
    wanted, rows = expected(it), {row[: len(KEY)]: row for row in it.table.select(*KEY, "rank", "log_prob").iter_rows()}
    assert len(rows) == len(it.table)
    unlucky = {set_of(key) for key, score in wanted.items() if name in WHOLE and score() is None}
    assert bool(unlucky) == (name == "glm4_moe"), "the case must arise"
    assert rows.keys() == {key for key in wanted if set_of(key) not in unlucky}
    undisturbed = {key[-1]: row[-1] for key, row in rows.items() if key[0] == "clean"}
    moved, compared = 0, sorted(rows, key=str)[:: 1 if name in WHOLE else 31]
    for key in compared:
        score, (*_, rank, log_prob) = wanted[key](), rows[key]
        assert log_prob == pytest.approx(score.log_prob, abs=2e-4), key
        assert rank in score.ranks, key
        moved += abs(log_prob - undisturbed[key[-1]]) > 1e-2
    assert moved > len(compared) / 2, "the case must arise: interventions that change something"


def set_of(key: tuple) -> tuple:
    """What is blocked in one pass: (experiment, semantics, size, control, seed, whether sets go by fold)."""
    of = dict(zip(KEY, key, strict=True))
    return (*(of[name] for name in ("experiment", "semantics", "size", "control", "seed")), of["fold"] is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_cannot_be_blocked_is_told(name):
    """Sets that leave a router with too few are named, and their relation."""
    it = case(name)
    found = {line.partition(": ")[0] for line in it.left_out}
    there = set(map(set_of, it.table.filter(pl.col("experiment") == "blocking").select(KEY).iter_rows()))
    absent = set()
    for one in it.plan:
        for how in ("reroute", "reroute_logit", "min_logit", "zero_weight"):
            key = "blocking", how, one.size, one.control, one.seed, one.folds
            if key not in there or (how != "zero_weight" and crowded(one)):
                absent.add(f"blocking by {how}, top {one.size}, control {one.control}")
    assert found == absent
    assert len(it.left_out) == len(set(it.left_out)) > 0
    if name != "glm4_moe":
        ways = ("min_logit", "reroute", "reroute_logit")
        assert it.left_out == [
            f"blocking by {how}, top 10, control none: no router would have enough others, language1" for how in ways
        ]


@pytest.mark.parametrize("name", WHOLE)
def test_prompts_that_begin_alike_are_blocked_apart(name):
    """The most likely mistake: that equal beginnings share what they compute, whatever is blocked in either."""
    it = case(name)
    tokens = {row: target.tokens for row, target in zip(it.run.prompts["prompt_id"], it.run.targets, strict=True)}
    assert tokens["capital0/0"] == tokens["capital1/0"] != tokens["capital0/2"]
    assert len(tokens["capital0/0"]) == len(tokens["capital0/2"])
    assert tokens["capital0/0"][:3] == tokens["capital0/2"][:3]
    batches = []

    @contextlib.contextmanager
    def watching(batch: passes.Batch) -> Iterator[None]:
        batches.append(it.run.prompts["prompt_id"].gather(batch.rows.tolist()).to_list())
        yield

    with torch.no_grad(), replay.sparing(it.run.decomposition) as distinct:
        labels = expert_sets.parts(it.run.prompts)[1]
        passes.Passes(it.run, distinct, labels).run(np.ones(len(labels), dtype=bool), None, watching)
    assert any({"capital0/0", "capital1/0", "capital0/2", "capital1/2"} <= set(batch) for batch in batches)
    for crossed in (True, False):
        of_fold = pl.col("fold").is_not_null() if crossed else pl.col("fold").is_null()
        own = it.table.filter(pl.col("experiment") == "blocking", pl.col("control") == "none", of_fold)
        pairs = own.with_columns(number=pl.col("prompt_id").str.split("/").list.get(1)).filter(
            pl.col("prompt_id").str.starts_with("capital")
        )
        of_text = pairs.group_by("semantics", "size", "number").agg(pl.col("log_prob"))
        differences = of_text.filter(pl.col("log_prob").list.len() == 2)["log_prob"].list.eval(
            pl.element().max() - pl.element().min()
        )
        assert (differences.explode() > 1e-2).mean() > 0.5
    ours = pl.col("control") == "random", pl.col("size") == 1, pl.col("prompt_id").str.starts_with("capital")
    random = it.table.filter(*ours)  # of larger sets each relation has as many as lead there
    assert random["relation"].null_count() == len(random) > 0
    same = random.with_columns(number=pl.col("prompt_id").str.split("/").list.get(1))
    same = same.group_by("semantics", "size", "seed", "number").agg(pl.col("log_prob").max() - pl.col("log_prob").min())
    assert same["log_prob"].max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_routing_and_hits_against_counting_by_hand(name):
    """Every position of every prompt, run alone: what its routers choose, and how often; the last layer too."""
    it = case(name)
    prefixes = {row: path for group in it.groups for row, path in zip(group.rows.tolist(), group.prefixes, strict=True)}
    counts = {layer: np.zeros((len(it.parts), 12), dtype=int) for layer in by_prompt.blocks(it.model)}
    times = [0] * len(it.times)
    for p, (relation, group) in enumerate(it.run.prompts.select("relation", "group").rows()):
        label = it.parts.index((relation, 0 if group < 5 else 1))
        for position, number in enumerate(prefixes[p].tolist()):
            times[number] += 1
            for layer, found in it.clean.items():
                chosen = weights(it.alone[p].index[layer], it.alone[p].weight[layer], position)
                assert weights(found.index, found.weight, number) == pytest.approx(chosen, abs=1e-5)
                assert torch.allclose(found.router[number], it.alone[p].router[layer][position], atol=1e-5)
                for e in chosen:
                    counts[layer][label, e] += 1
    assert times == it.times.tolist()
    assert max(times) > 1, "the case must arise: prefixes that occur more than once"
    assert it.hits.keys() == it.clean.keys() == counts.keys()
    last = torch.stack([prefixes[p][-1] for p in range(len(it.alone))])
    for layer, count in counts.items():
        assert np.array_equal(it.hits[layer], count)
        assert count.sum() == 3 * sum(len(target.tokens) for target in it.run.targets)
        found, record = it.clean[layer], it.run.trace.layers[layer]
        index, order = found.index[last].sort(dim=1)
        assert torch.equal(index, record.index)
        assert torch.allclose(found.weight[last].gather(1, order), record.weight, atol=1e-5)
        assert torch.allclose(found.router[last], record.router, atol=1e-5)


def weights(index: torch.Tensor, weight: torch.Tensor, row: int) -> dict[int, float]:
    return dict(zip(index[row].tolist(), weight[row].tolist(), strict=True))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"top_n": [4]}, "top_n 4: routers fill 3 slots"),
        ({"top_n": [-1]}, "top_n -1"),
        ({"only_rank": [0]}, "only_rank 0: routers fill 3 slots, counted from 1"),
        ({"top_n": "all", "drop_rank": [1, 4]}, "drop_rank 4"),
    ],
)
def test_a_budget_of_other_slots_is_an_error(asked, message):
    with pytest.raises(InterventionError, match=message):
        expert_ablation.budgets(asked, ("family",), 3, shared=False)


def test_budgets_are_those_that_are_asked_for():
    found = expert_ablation.budgets({"top_n": [2], "drop_rank": "all"}, ("keep",), 2, shared=True)
    assert [(b.mode, b.size, b.weights, b.shared) for b in found] == [
        (mode, n, "keep", shared)
        for mode, n in (("top_n", 2), ("drop_rank", 1), ("drop_rank", 2))
        for shared in (True, False)
    ]


# ---- the experiments as a whole ------------------------------------------------------------------------------------

#: Found for fold 0 and for fold 1.
PAIRS = [(0, 1, 2, 3), (2, 0, 2, 5)]
ASKED = experiments.Asked(
    budgets={"top_n": [0, 1], "drop_rank": [2]},
    weights=["family"],
    semantics=("reroute", "zero_weight"),
    importance=METHOD,
    seeds=1,
    gradient_steps=8,
)
FEW = dataclasses.replace(ASKED, budgets={"top_n": [0]}, semantics=("zero_weight",))


def associations(pairs: list[tuple] = PAIRS) -> pl.DataFrame:
    """Pairs found for a fold each, one on all prompts and one of a relation."""
    found = [(None, fold, *pair) for fold, pair in enumerate(pairs)]
    others = [(None, None, 0, 3, 2, 2), ("capital0", 0, 0, 2, 2, 1)]
    return tables.of_rows([(*row, 0.5, 0.1, None, None, 0.3, 0.6, 10, 12) for row in found + others], "associations")


def everything(
    model: nn.Module, asked: experiments.Asked = ASKED, prompts: pl.DataFrame | None = None
) -> dict[str, pl.DataFrame]:
    prompts = by_prompt.prompts() if prompts is None else prompts
    importance = leading(model, grouped=False)
    return experiments.intervene(model, models.tokenizer(), prompts, importance, associations(), asked)


def reported(model: nn.Module, importance: pl.DataFrame, asked: experiments.Asked, pairs: list[tuple] = PAIRS) -> tuple:
    with torch.no_grad(), precision.computing_in_float32(model):
        run = clean.CleanRun.of(model, models.tokenizer(), by_prompt.prompts())
        return experiments.intervene_run(run, importance, associations(pairs), asked)


def test_weights_stored_in_bfloat16_give_the_float32_results():
    """And what was changed comes back bit by bit."""
    stored = by_prompt.build("qwen2_moe", dtype=torch.bfloat16)
    before = [(p, p.data_ptr(), p.clone()) for p in stored.parameters()]
    whole = copy.deepcopy(stored)
    for parameter in whole.parameters():
        parameter.data = parameter.data.float()
    exact = [p.clone() for p in whole.parameters()]
    one, two = everything(stored), everything(whole)
    assert set(one) == {"expert_interventions", "gates", "gradients"}
    for table, frame in one.items():
        assert len(frame)
        assert_frame_equal(frame, two[table], abs_tol=5e-5, rel_tol=5e-5)
    assert all(p.data_ptr() == at and p.dtype == torch.bfloat16 and torch.equal(p, x) for p, at, x in before)
    assert all(torch.equal(a, b) for a, b in zip(exact, whole.parameters(), strict=True))
    assert by_prompt.untouched(stored)
    assert by_prompt.untouched(whole)


def test_results_depend_neither_on_the_batch_nor_on_the_order_of_prompts(monkeypatch):
    model = by_prompt.build("qwen2_moe")
    together = everything(model)
    monkeypatch.setattr(passes, "_CACHED_TOKENS", 1)  # one prompt a batch
    alone = everything(model, prompts=by_prompt.prompts().sample(fraction=1, shuffle=True, seed=1))
    for table, frame in together.items():
        assert_frame_equal(frame, alone[table], abs_tol=5e-5, rel_tol=5e-5)


def test_pairs_found_on_a_fold_are_tested_on_the_other_and_named_ones_on_all():
    """``fold`` of ``associations`` is the one to be tested; pairs of single relations are not followed."""
    model, groups = by_prompt.build("olmoe"), dict(by_prompt.prompts().select("prompt_id", "group").rows())
    named = (1, 2, 2, 7)
    found = everything(model, dataclasses.replace(FEW, pairs=[named]))
    rows = found["expert_interventions"].filter(pl.col("experiment").is_in(["suppression", "forcing"]))
    labels = {pair: "H({},{})-E({},{})".format(*pair) for pair in (*PAIRS, named)}
    assert set(rows["mode"]) == set(labels.values())
    assert set(found["gradients"]["expert"]) == {3, 5, 7}
    for pair, fold in ((PAIRS[0], 0), (PAIRS[1], 1), (named, None)):
        mine = {prompt for prompt, group in groups.items() if fold is None or (group >= 5) == bool(fold)}
        of_pair = rows.filter(pl.col("mode") == labels[pair])
        assert of_pair.select(pl.col("fold").eq_missing(fold).all()).item()
        assert set(of_pair["experiment"]) == {"suppression", "forcing"}
        gates = found["gates"].filter(pl.col("layer") == pair[0])
        gradients = found["gradients"].filter(pl.col("head_layer") == pair[0], pl.col("expert") == pair[3])
        for part in (of_pair, gates, gradients):
            assert set(part["prompt_id"]) == mine


def test_a_pair_that_is_found_and_named_has_one_row_in_gates():
    """The table does not say why a head was zeroed."""
    model = by_prompt.build("olmoe")
    both = everything(model, dataclasses.replace(FEW, pairs=PAIRS))
    found = everything(model, FEW)
    for table in ("gates", "gradients"):
        key = list(tables.SCHEMAS[table].key)
        again = both[table].join(found[table].select(key), on=key, how="semi", nulls_equal=True)
        assert_frame_equal(again, found[table], abs_tol=1e-6)
    assert len(both["gates"]) == 10 * 2 * (3 + 1 + 1 + 1)


def test_the_report():
    """What could not be done, how well controls match, what a pass taken up in the middle is off by."""
    model = by_prompt.build("olmoe")
    few = dataclasses.replace(FEW, semantics=("reroute",))
    found, report = reported(model, leading(model, grouped=False), few, [])
    *left_out, one, five, ten = report["notes"]
    assert left_out == [
        "language1: top 10, matched control: too few other experts in a layer",
        "blocking by reroute, top 10, control none: no router would have enough others, language1",
    ]
    for size, line in ((1, one), (5, five), (10, ten)):
        said = rf"blocked top {size}: chosen (\d\.\d\d) times as often .*, (\d\.\d\d) times at the last one"
        ratio = re.fullmatch(said, line)
        assert 0.5 < float(ratio[1]) < 2
        assert float(ratio[2]) != float(ratio[1])
    assert report["replay_error"] < 1e-5
    assert len(found["gates"]) == len(found["gradients"]) == 0


def test_where_nobody_knows_what_routers_make_of_their_logits():
    """Phi-MoE: slots and experts are taken away all the same, and it is said why no pair is followed."""
    one = [("capital0", METHOD, fold, 1, 0, 2, 1.0) for fold in (None, 0, 1)]
    found, report = reported(models.build("phimoe"), tables.of_rows(one, "expert_importance"), ASKED)
    assert any("what the routers make of their logits is not known" in line for line in report["notes"])
    assert any(line.startswith("blocking by reroute, top 1, control none: layer 0") for line in report["notes"])
    assert set(found["expert_interventions"].select("experiment", "semantics").unique().rows()) == {
        ("clean", None),
        ("budget", None),
        ("blocking", "zero_weight"),
    }
    assert len(found["gates"]) == len(found["gradients"]) == 0


def test_a_model_without_experts_is_an_error():
    nobody = tables.of_rows([], "expert_importance")
    with pytest.raises(ExpertError, match="LlamaForCausalLM: no layer routes between experts; name a mixture of"):
        experiments.intervene(models.build("llama"), models.tokenizer(), by_prompt.prompts(), nobody, associations([]))


@pytest.mark.parametrize("budgets", [{}, {"top_n": []}])
def test_no_budget_may_be_asked_for(budgets):
    asked = dataclasses.replace(FEW, budgets=budgets)
    found, _ = reported(by_prompt.build("olmoe"), tables.of_rows([], "expert_importance"), asked, [])
    assert set(found["expert_interventions"]["experiment"]) == {"clean", "blocking"}, "random controls need no list"
