"""A forward pass taken up in the middle is the whole forward pass."""

import copy
from types import SimpleNamespace

import pytest
import torch

from moescope import clean, precision, replay
from moescope.decomposition import Decomposition, decoder_of
from tests.model import models

FAMILIES = ["llama", "olmo", "olmoe", "qwen2_moe"]
IDS = torch.randint(3, 300, (5, 9), generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([7, 250, 31, 4, 99])


def everything(model, ids=IDS):
    """(what every layer reads and the norm too, [B, T, d]; logits at the last position), by hooks of the test's own."""
    seen, decoder = [], decoder_of(model)
    keep = lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
    hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in (*decoder.layers, decoder.norm)]
    with torch.no_grad(), precision.computing_in_float32(model):
        logits = model(ids).logits[:, -1]
    for hook in hooks:
        hook.remove()
    return seen, logits


def untouched(model):
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_from_any_layer_as_from_the_start(name, dtype):
    model = models.build(name, dtype=dtype)
    decomposition = Decomposition(model)
    seen, logits = everything(model)
    layers = list(model.model.layers)
    with precision.computing_in_float32(model):
        for layer in range(4):
            assert torch.equal(replay.hidden_at(decomposition, layer, IDS), seen[layer])
            with replay.from_layer(decomposition, layer, seen[layer]):
                assert torch.equal(replay.last_logits(model, IDS), logits)
            # what is carried on counts, not the token ids
            with replay.from_layer(decomposition, layer, seen[layer].flip(0)):
                changed = replay.last_logits(model, IDS)
            assert (changed - logits).abs().max() > 1e-3
        with replay.from_layer(decomposition, 1, seen[1]):
            assert torch.equal(replay.hidden_at(decomposition, 2, IDS), seen[2])
    assert list(model.model.layers) == layers
    assert untouched(model)


@torch.no_grad()
def test_layers_that_return_a_tuple():
    """As those of many architectures do; their model reads the first element."""
    model = models.build("llama")
    seen, logits = everything(model)

    class Tupled(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args, **kwargs):
            return self.layer(*args, **kwargs), None

    class Reader(torch.nn.Module):
        """A decoder with the loop of those models."""

        def __init__(self, model):
            super().__init__()
            self.config, self.lm_head, self.decoder = model.config, model.lm_head, model.model
            self.decoder.layers = torch.nn.ModuleList(map(Tupled, self.decoder.layers))
            self.get_decoder, self.get_output_embeddings = lambda: self.decoder, lambda: self.lm_head

        def forward(self, ids, **kwargs):
            hidden = self.decoder.embed_tokens(ids)
            position = self.decoder.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
            for layer in self.decoder.layers:
                hidden = layer(hidden, position_embeddings=position)[0]
            return SimpleNamespace(logits=self.lm_head(self.decoder.norm(hidden))[:, -1:])

    reader = Reader(model)
    decomposition = Decomposition(reader)
    for layer in range(4):
        assert torch.equal(replay.hidden_at(decomposition, layer, IDS), seen[layer])
        with replay.from_layer(decomposition, layer, seen[layer]):
            assert torch.equal(replay.last_logits(reader, IDS), logits)


@torch.no_grad()
def test_skipped_layers_do_not_run_and_come_back_after_an_exception():
    model = models.build("llama")
    decomposition, runs = Decomposition(model), []
    layers = list(model.model.layers)
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda m, a, i=i: runs.append(i))
    hidden = replay.hidden_at(decomposition, 1, IDS)
    assert runs == [0]
    with replay.from_layer(decomposition, 2, hidden):
        replay.last_logits(model, IDS)
    assert runs == [0, 2]
    with pytest.raises(IndexError), replay.from_layer(decomposition, 2, hidden):
        model(IDS + 10**6)
    assert list(model.model.layers) == layers


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_feed_forward_parts_run_where_prefixes_differ_and_at_the_last_position(name):
    """Prompts that begin alike: a prefix is computed once in all layers but the last, to the same end."""
    model, tokens = models.build(name), []
    ids = IDS.clone()
    ids[1, :4] = ids[0, :4]
    ids[3, :8] = ids[0, :8]
    prefixes = torch.arange(45).view(5, 9)
    prefixes[1, :4], prefixes[3, :8] = prefixes[0, :4], prefixes[0, :8]
    decomposition = Decomposition(model)
    _, logits = everything(model, ids)
    # the router or the gate projection sees the tokens that a feed-forward part works on
    inside = [getattr(layer.mlp, "gate", None) or layer.mlp.gate_proj for layer in model.model.layers]
    hooks = [m.register_forward_hook(lambda m, a, out: tokens.append(a[0].shape[:-1].numel())) for m in inside]
    with replay.sparing(decomposition) as distinct:
        distinct.of(prefixes)
        assert (replay.last_logits(model, ids) - logits).abs().max() < 1e-5
        assert tokens == [45 - 4 - 8, 45 - 4 - 8, 5]
        distinct.of(prefixes[[2, 4]])
        assert (replay.last_logits(model, ids[[2, 4]]) - logits[[2, 4]]).abs().max() < 1e-5
    for hook in hooks:
        hook.remove()
    assert untouched(model)
    assert torch.equal(everything(model, ids)[1], logits)


def by_hook(model, layer, ids, shift):
    """log p of all tokens with something added to what a layer leaves at the last position: a whole forward pass."""

    def add(module, args, out):
        out = out.clone()
        out[:, -1] += shift
        return out

    hook = decoder_of(model).layers[layer].register_forward_hook(add)
    logits = model(ids).logits[:, -1]
    hook.remove()
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("length", [9, 2, 1])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_changed_last_position_is_a_whole_pass_with_the_change(name, length):
    """After every layer; the same prompt in several rows, and rows in any order."""
    model, ids = models.build(name), IDS[:, :length]
    decomposition = Decomposition(model)
    seen, logits = everything(model, ids)
    last = replay.LastPosition(decomposition, ids, TARGET)
    prompts = torch.tensor([4, 0, 0, 2, 1, 4, 3])
    for layer in range(3):
        clean_residual = seen[layer + 1][prompts, -1]
        truth = logits.double().log_softmax(-1).gather(1, TARGET[:, None])[prompts, 0]
        assert (last.log_prob(layer, clean_residual, prompts) - truth).abs().max() < 1e-5
        shift = torch.randn(len(prompts), 32, generator=torch.Generator().manual_seed(layer))
        found = last.log_prob(layer, clean_residual + shift, prompts)
        for row, prompt in enumerate(prompts.tolist()):
            expected = by_hook(model, layer, ids[prompt : prompt + 1], shift[row])[0, TARGET[prompt]]
            assert abs(found[row] - expected) < 1e-5
    assert untouched(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_against_autograd_and_finite_differences(name):
    """Autograd through a whole pass of a float64 copy; steps in a direction for what autograd could have in common."""
    model = models.build(name)
    decomposition = Decomposition(model)
    seen, _ = everything(model)
    last = replay.LastPosition(decomposition, IDS, TARGET)
    found = last.gradients([hidden[:, -1] for hidden in seen[1:]])
    exact = copy.deepcopy(model).double()
    if hasattr(exact.config, "num_experts"):
        exact.set_experts_implementation("eager")
    for layer in range(3):
        shift = torch.zeros(5, 32, dtype=torch.float64, requires_grad=True)
        value = by_hook(exact, layer, IDS, shift).gather(1, TARGET[:, None]).sum()
        (truth,) = torch.autograd.grad(value, shift)
        assert (found[layer] - truth).abs().max() < 1e-4 * truth.abs().max()
        direction = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).double()
        step = 3e-3  # norms compute in float32 even here
        with torch.no_grad():
            up, down = (by_hook(exact, layer, IDS, k * direction).gather(1, TARGET[:, None]) for k in (step, -step))
        slope = (up - down)[:, 0] / (2 * step)
        assert torch.allclose(slope, (found[layer] * direction).sum(1), rtol=5e-3, atol=5e-3)
    assert untouched(model)


def test_gradients_of_weights_stored_in_bfloat16():
    """A block is float32 only while it runs, and its weights come back before the backward pass."""
    stored = models.build("qwen2_moe", dtype=torch.bfloat16)
    seen, _ = everything(stored)
    residuals = [hidden[:, -1] for hidden in seen[1:]]
    with torch.no_grad(), precision.computing_in_float32(stored):
        found = replay.LastPosition(Decomposition(stored), IDS, TARGET).gradients(residuals)
    whole = copy.deepcopy(stored)
    for parameter in whole.parameters():
        parameter.data = parameter.data.float()
    truth = replay.LastPosition(Decomposition(whole), IDS, TARGET).gradients(residuals)
    for one, two in zip(found, truth, strict=True):
        assert torch.equal(one, two)


@torch.no_grad()
def test_runs_do_not_change_what_they_start_from():
    model = models.build("olmoe")
    seen, _ = everything(model)
    last = replay.LastPosition(Decomposition(model), IDS, TARGET)
    residual, everyone = seen[1][:, -1], torch.arange(5)
    first = last.log_prob(0, residual, everyone)
    last.log_prob(0, residual[[1, 1]] * 2, torch.tensor([1, 1]))
    assert torch.equal(last.log_prob(0, residual, everyone), first)
    assert {layer.keys.shape[-2] for layer in last.cache.layers} == {8}


def test_log_prob_of_large_and_of_small_logits():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 50)[:, None]
    target = torch.randint(1000, (50,), generator=torch.Generator().manual_seed(1))
    truth = logits.double().log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert (replay.log_prob(logits, target) - truth).abs().max() < 2e-7


def test_prompts_by_length_are_all_there_without_padding():
    model, prompts = models.build("olmo"), models.prompts(2)
    with precision.computing_in_float32(model):
        run = clean.CleanRun.of(model, models.tokenizer(), prompts)
    groups = replay.by_length(run)
    assert sorted(i for group in groups for i in group.rows.tolist()) == list(range(len(prompts)))
    numbers = {}
    for group in groups:
        for row, ids, prefixes in zip(group.rows.tolist(), group.ids.tolist(), group.prefixes.tolist(), strict=True):
            assert tuple(ids) == run.targets[row].tokens
            for i, number in enumerate(prefixes):
                assert numbers.setdefault(number, tuple(ids[: i + 1])) == tuple(ids[: i + 1])
    assert len(set(numbers.values())) == len(numbers) < sum(len(t.tokens) for t in run.targets)
    assert len(groups) > 2
