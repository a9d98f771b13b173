"""Passes over all prompts give what each gives by itself, whatever runs beside it and wherever it is taken up."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from moescope import clean, interventions, passes, precision, replay
from tests.model import by_prompt, models

FAMILIES = ["olmoe", "qwen2_moe", "deepseek_v3"]


class Uneven(nn.Module):
    """A mixture that is given more than hidden states, as the feed-forward parts of some families are."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = mlp.gate, mlp.experts
        self.__dict__["whole"] = mlp.forward

    def forward(self, hidden: torch.Tensor, _: torch.Tensor | None = None) -> torch.Tensor:
        return self.whole(hidden)


def unspared() -> nn.Module:
    """A model in which the feed-forward part of the second layer runs in full."""
    model = by_prompt.build("olmoe", experts=6, slots=2)
    layer = model.model.layers[1]
    layer.mlp = Uneven(layer.mlp)
    layer.mlp.register_forward_pre_hook(lambda m, args: (args[0], args[0]))
    return model


def build(name: str) -> nn.Module:
    return unspared() if name == "unspared" else by_prompt.build(name, experts=6, slots=2)


@functools.cache
def start(name: str) -> clean.CleanRun:
    model = build(name)
    with torch.no_grad(), precision.computing_in_float32(model):
        return clean.CleanRun.of(model, models.tokenizer(), by_prompt.prompts())


@functools.cache
def alone(name: str) -> list[by_prompt.Seen]:
    """The prompts, each by itself, in a model of the same weights that nobody else touches."""
    model = build(name)
    return [by_prompt.run(model, target.tokens) for target in start(name).targets]


def labels_of(run: clean.CleanRun) -> np.ndarray:
    return run.prompts["relation"].rank("dense").to_numpy().astype(int) - 1


def everyone(run: clean.CleanRun) -> np.ndarray:
    return np.ones(len(run.prompts), dtype=bool)


@contextlib.contextmanager
def passes_of(run: clean.CleanRun, labels: np.ndarray | None = None) -> Iterator[passes.Passes]:
    with torch.no_grad(), replay.sparing(run.decomposition) as distinct:
        yield passes.Passes(run, distinct, labels)


def compare(run: clean.CleanRun, name: str, found: tuple[np.ndarray, np.ndarray]) -> None:
    for p, (log_prob, rank) in enumerate(zip(*found, strict=True)):
        score = alone(name)[p].score(int(run.target[p]))
        assert log_prob == pytest.approx(score.log_prob, abs=2e-5)
        assert rank in score.ranks


def blocking(run: clean.CleanRun, labels: np.ndarray, layers: list[int]) -> passes.During:
    """Expert (label + layer) mod 6 is kept out of the prompts of every label."""

    def during(batch: passes.Batch) -> contextlib.AbstractContextManager:
        masks = {}
        label = torch.zeros(int(batch.prefixes.max()) + 1, dtype=torch.long)
        label[batch.prefixes] = torch.as_tensor(labels)[batch.rows][:, None].expand_as(batch.prefixes)
        for layer in layers:
            at = batch.at(layer)
            masks[layer] = torch.zeros(len(at), 6, dtype=torch.bool)
            masks[layer][torch.arange(len(at)), (label[at] + layer) % 6] = True
        return interventions.block(run.decomposition, masks, "zero_weight")

    return during


def blocked_alone(run: clean.CleanRun, labels: np.ndarray) -> list[by_prompt.Score]:
    """The same for one prompt at a time, by hooks of the test's own."""
    scores = []
    for p, target in enumerate(run.targets):
        hooks = []
        for layer, block in by_prompt.blocks(run.model).items():
            number = (int(labels[p]) + layer) % 6
            drop = lambda m, a, number=number: (a[0], a[1], a[2] * (a[1] != number))  # noqa: E731
            hooks.append(block.experts.register_forward_pre_hook(drop))
        scores.append(by_prompt.run(run.model, target.tokens).score(int(run.target[p])))
        for hook in hooks:
            hook.remove()
    return scores


@pytest.mark.parametrize("name", [*FAMILIES, "unspared"])
def test_a_clean_pass_is_every_prompt_by_itself_whatever_its_label(name):
    run = start(name)
    many = np.arange(len(run.prompts))[::-1].copy()
    for labels in (None, labels_of(run), many):
        with passes_of(run, labels) as again:
            assert again.error() < 2e-5
            compare(run, name, again.run(everyone(run), None))
            for layer in (1, 2):
                again.start_at(layer)
                compare(run, name, again.run(everyone(run), again.before.residual_out))
    assert by_prompt.untouched(run.model) or name == "unspared"


@pytest.mark.parametrize("name", [*FAMILIES, "unspared"])
def test_every_layer_is_taken_up_where_it_was_left_later_and_earlier_again(name):
    """The stream by prefix is what the layer reads there in any prompt; results are the same on the way back."""
    run = start(name)
    first = {}
    with passes_of(run, labels_of(run)) as again:
        for layer in (0, 1, 2, 1, 2, 2, 0, 2):
            again.start_at(layer)
            assert again.layer == layer
            stream = again.before.residual_out
            assert (stream is None) == (layer == 0)
            for group in again.groups:
                for row, path in zip(group.rows.tolist(), group.prefixes, strict=True):
                    if layer:
                        assert torch.allclose(stream[path], alone(name)[row].hidden[layer], atol=2e-5)
            found = again.run(everyone(run), stream)
            assert np.allclose(found, first.setdefault(layer, found), rtol=0, atol=2e-6)
            compare(run, name, found)


@pytest.mark.parametrize("name", [*FAMILIES, "unspared"])
def test_where_the_positions_of_a_batch_stand(name):
    """``at``: what experts are given, row by row; ``last``: where among them the prompts end. In every layer."""
    run, seen, checked = start(name), {}, 0
    hooks = [
        block.experts.register_forward_pre_hook(lambda m, a, i=i: seen.update({i: a[0]}))
        for i, block in by_prompt.blocks(run.model).items()
    ]
    with passes_of(run, labels_of(run)) as again:
        again.error()
        position_of = {
            number: (row, position)
            for group in again.groups
            for row, path in zip(group.rows.tolist(), group.prefixes.tolist(), strict=True)
            for position, number in enumerate(path)
        }

        @contextlib.contextmanager
        def watching(batch: passes.Batch) -> Iterator[None]:
            nonlocal checked
            before = {layer: (batch.at(layer), batch.last(layer)) for layer in by_prompt.blocks(run.model)}
            yield
            for layer, (at, last) in before.items():
                assert len(at) == len(seen[layer])
                for number, hidden in zip(at.tolist(), seen[layer], strict=True):
                    row, position = position_of[number]
                    assert torch.allclose(hidden, alone(name)[row].given[layer][position], atol=2e-5)
                for row, place in zip(batch.rows.tolist(), last.tolist(), strict=True):
                    assert torch.allclose(seen[layer][place], alone(name)[row].given[layer][-1], atol=2e-5)
                assert torch.equal(at[last], batch.prefixes[:, -1])
                assert torch.equal(batch.at(layer), at)
                checked += 1

        again.run(everyone(run), None, watching)
        given = dict(again.distinct.given)
    for hook in hooks:
        hook.remove()
    expected = {layer: "last" if layer == 2 else "distinct" for layer in by_prompt.blocks(run.model)}
    if name == "unspared":
        del expected[1]
    assert given == expected
    assert checked == len(expected | {1: ""} if name == "unspared" else expected) * len(again.groups)


@pytest.mark.parametrize("name", [*FAMILIES, "unspared"])
@pytest.mark.parametrize("tokens", [1, 11, 2_048])
def test_prompts_treated_apart_are_each_by_itself(name, tokens, monkeypatch):
    """One prompt a batch, a few, or all; from the start and taken up at a later layer."""
    monkeypatch.setattr(passes, "_CACHED_TOKENS", tokens)
    run = start(name)
    labels, layers = labels_of(run), list(by_prompt.blocks(run.model))
    expected = blocked_alone(run, labels)
    with passes_of(run, labels) as again:
        again.error()
        assert again.tokens == tokens
        found = [again.run(everyone(run), None, blocking(run, labels, layers))]
        again.start_at(layers[0])
        found.append(again.run(everyone(run), again.before.residual_out, blocking(run, labels, layers)))
    for log_prob, rank in found:
        for p, score in enumerate(expected):
            assert log_prob[p] == pytest.approx(score.log_prob, abs=2e-5)
            assert rank[p] in score.ranks
    undisturbed = [seen.score(int(run.target[p])).log_prob for p, seen in enumerate(alone(name))]
    assert sum(abs(s.log_prob - x) > 1e-3 for s, x in zip(expected, undisturbed, strict=True)) > len(expected) / 3


def test_only_what_is_asked_for_runs():
    run = start("olmoe")
    asked, rows = np.zeros(len(run.prompts), dtype=bool), []
    asked[[1, 4, 7]] = True

    @contextlib.contextmanager
    def watching(batch: passes.Batch) -> Iterator[None]:
        rows.extend(batch.rows.tolist())
        yield

    with passes_of(run) as again:
        whole = again.run(everyone(run), None)
        log_prob, rank = again.run(asked, None, watching)
        nothing = again.run(~everyone(run), None, watching)
    assert sorted(rows) == [1, 4, 7]
    assert np.allclose(log_prob[asked], whole[0][asked], atol=1e-5)
    assert np.array_equal(rank[asked], whole[1][asked])
    for values, mask in ((log_prob, ~asked), (nothing[0], everyone(run))):
        assert np.isnan(values[mask]).all()
    assert not rank[~asked].any()
    assert not nothing[1].any()


def test_results_do_not_depend_on_the_order_of_prompts():
    model = by_prompt.build("qwen2_moe", experts=6, slots=2)
    found = []
    for prompts in (by_prompt.prompts(), by_prompt.prompts().sample(fraction=1, shuffle=True, seed=3)):
        with torch.no_grad(), precision.computing_in_float32(model):
            run = clean.CleanRun.of(model, models.tokenizer(), prompts)
            with passes_of(run, labels_of(run)) as again:
                again.error()
                during = blocking(run, labels_of(run), [0, 2])
                log_prob, rank = again.run(everyone(run), None, during)
        found.append(dict(zip(run.prompts["prompt_id"], zip(log_prob, rank, strict=True), strict=True)))
    assert found[0].keys() == found[1].keys()
    for prompt, (log_prob, rank) in found[0].items():
        assert found[1][prompt] == (pytest.approx(log_prob, abs=1e-5), rank)


def test_weights_stored_in_bfloat16():
    """Larger batches, since each pays for the upcast; the same results as of the weights in float32."""
    stored = by_prompt.build("olmoe", experts=6, slots=2, dtype=torch.bfloat16)
    results, bits = [], [p.clone() for p in stored.parameters()]
    for upcast in (False, True):
        if upcast:
            for parameter in stored.parameters():
                parameter.data = parameter.data.float()
        with torch.no_grad(), precision.computing_in_float32(stored):
            run = clean.CleanRun.of(stored, models.tokenizer(), by_prompt.prompts())
            with passes_of(run, labels_of(run)) as again:
                assert again.tokens == (passes._CACHED_TOKENS if upcast else clean.BATCH_TOKENS)
                again.error()
                again.start_at(1)
                during = blocking(run, labels_of(run), [1, 2])
                results.append(again.run(everyone(run), again.before.residual_out, during))
        assert all(torch.equal(a, b if upcast else b.data) for a, b in zip(stored.parameters(), bits, strict=True))
    assert np.allclose(*(log_prob for log_prob, _ in results), atol=2e-5)
    assert np.array_equal(*(rank for _, rank in results))
