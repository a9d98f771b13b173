"""The decomposition is exact on real classes, and refuses what it cannot take apart."""

import pytest
import torch
from torch import nn

from moescope import clean, targets
from moescope.decomposition import (
    Decomposition,
    DecompositionError,
    layers_of,
    routed_rows,
    scoring_of,
)
from tests.model import models


def trace_of(model, times=1):
    rows = models.prompts(times).to_dicts()
    tokens = [t.tokens for t in targets.find(models.tokenizer(), rows)]
    return Decomposition(model).trace(clean.batched(tokens, torch.device("cpu")))


@pytest.mark.parametrize("name", [*models.FAMILIES, *models.LAYOUTS])
def test_contributions_sum_to_what_each_layer_wrote(name):
    """Neuron by neuron, with the layers' inputs and outputs taken by hooks of the test's own, one prompt at a time."""
    model = models.build(name)
    trace = trace_of(model)
    rows = models.prompts().to_dicts()
    for p, target in enumerate(targets.find(models.tokenizer(), rows)):
        seen, layers = [], layers_of(model)
        keep = lambda m, a, out, seen=seen: seen.append((a[0][0, -1].double(), out[0, -1].double()))  # noqa: E731
        hooks = [layer.register_forward_hook(keep) for layer in layers]
        with torch.no_grad():
            model(torch.tensor([target.tokens]))
        for hook in hooks:
            hook.remove()
        for i, (before, after) in enumerate(seen):
            total = before.clone()
            for site in trace.decomposition.at(i):
                record = trace.layers[i]
                c = record.coefficients[site.name][p].double()
                if site.kind == "routed":
                    for k, e in enumerate(record.index[p].tolist()):
                        for j in range(site.neurons):
                            total += c[k, j] * site.values(e)[j].double()
                else:
                    bias = site.module.bias if isinstance(site.module, nn.Linear) else None
                    total += 0 if bias is None else bias.detach().double()
                    for j in range(site.neurons):
                        total += c[j] * site.values()[j].double()
            assert (total - after).abs().max() <= 1e-5 * (after - before).abs().max()


@pytest.mark.parametrize("name", [*models.FAMILIES, *models.LAYOUTS])
def test_the_check_passes_with_room_to_spare(name):
    assert trace_of(models.build(name)).verified() < 2e-6


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("olmo2", {"attention_bias": True}),
        ("granite", {"attention_bias": True, "mlp_bias": True}),
        ("gpt_oss", {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8}),
    ],
)
def test_biases_are_scaled_as_the_neurons_are(name, over):
    """Behind a norm, behind a multiplier, and with the router's weight of the expert whose bias it is."""
    trace = trace_of(models.build(name, **over))
    assert any(site.bias(0) is not None for site in trace.decomposition.sites)
    assert trace.verified() < 2e-6


@pytest.mark.parametrize("name", ["olmo2", "flex_olmo", "gemma2"])
def test_the_values_behind_a_norm_do_not_depend_on_the_prompt(name):
    """All that a norm does differently from prompt to prompt is one factor of all coefficients of its branch."""
    model = models.build(name)
    one, other = Decomposition(model), Decomposition(model)
    for decomposition, ids in ((one, (5, 6, 7)), (other, (200, 9))):
        decomposition.trace(clean.batched([ids], torch.device("cpu"))).verified()
    for site, same in zip(one.sites, other.sites, strict=True):
        assert site.norm is not None
        assert torch.equal(site.values(0), same.values(0))
        assert not torch.allclose(site.values(0), site.stored(0), rtol=1e-2)


def test_sites_of_a_layer_with_shared_and_routed_experts():
    model = models.build("qwen2_moe")
    decomposition = Decomposition(model)
    assert [s.kind for s in decomposition.at(0)] == ["attn", "routed", "shared"]
    assert [s.kind for s in decomposition.at(1)] == ["attn", "dense"]  # mlp_only_layers
    attn, routed, shared = decomposition.at(0)
    assert (attn.heads, attn.neurons) == (4, 32)
    assert (routed.experts, routed.neurons, shared.neurons) == (6, 24, 32)


@pytest.mark.parametrize("name", ["olmoe", "olmoe_normed", "qwen2_moe"])
def test_router_weights_are_those_the_model_used(name):
    """Probability: softmax of the router's logits. Weight: what multiplies the expert, summing to one if normalised."""
    model = models.build(name)
    record = trace_of(model).layers[0]
    assert torch.allclose(record.probability.sum(1), torch.ones(len(record.probability)))
    top = record.probability.topk(2)
    assert torch.equal(record.index, top.indices.sort(1).values)
    normalised = name == "olmoe_normed"
    expected = top.values / top.values.sum(1, keepdim=True) if normalised else top.values
    assert torch.allclose(record.weight.sort(1).values, expected.sort(1).values, atol=1e-6)


def test_last_positions_do_not_depend_on_the_batch():
    """Padded among others = alone: residuals, coefficients, routing, logits."""
    model = models.build("qwen2_moe")
    together = trace_of(model)
    tokens = [t.tokens for t in targets.find(models.tokenizer(), models.prompts().to_dicts())]
    assert len({len(t) for t in tokens}) > 2  # uneven lengths, so that there is padding
    for p, ids in enumerate(tokens):
        alone = Decomposition(model).trace(clean.batched([ids], torch.device("cpu")))
        assert (alone.logits[0] - together.logits[p]).abs().max() < 2e-5
        for one, all_ in zip(alone.layers, together.layers, strict=True):
            for name, c in one.coefficients.items():
                assert (c[0] - all_.coefficients[name][p]).abs().max() < 2e-5
            if one.index is not None:
                assert torch.equal(one.index[0], all_.index[p])


def test_hooks_leave_the_model_alone():
    model = models.build("olmoe")
    ids = torch.randint(3, 300, (2, 7))
    with torch.no_grad():
        before = model(ids).logits
        trace_of(model)
        after = model(ids).logits
    assert torch.equal(before, after)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_are_removed_after_an_exception():
    model = models.build("olmoe")
    broken = model.model.layers[1].mlp.experts
    handle = broken.register_forward_pre_hook(lambda m, a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace_of(model)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_coefficient_that_is_off_is_noticed():
    trace = trace_of(models.build("olmoe"))
    site = trace.decomposition.at(1, "routed")[0]
    trace.layers[1].coefficients[site.name][2] *= 1.001
    with pytest.raises(DecompositionError, match="miss the residual stream"):
        trace.verified()


def test_a_norm_behind_a_branch_whose_gain_depends_on_what_it_reads_is_refused():
    """A module that looks like a norm on probes but is none: only the sum of the contributions tells."""
    model = models.build("olmo2")
    norm = model.model.layers[1].post_feedforward_layernorm
    forward = norm.forward
    norm.forward = lambda x: forward(x) * (1 + 0.01 * torch.tanh(x[..., :1] - x[..., 1:2]) ** 2 * (x[..., 2:3] > 0))
    with pytest.raises(DecompositionError, match="miss the residual stream"):
        trace_of(model).verified()


def test_nan_does_not_pass_the_check():
    trace = trace_of(models.build("llama"))
    trace.layers[2].coefficients["mlp.down_proj"][0, 0] = float("nan")
    with pytest.raises(DecompositionError, match="inf"):
        trace.verified()


@pytest.mark.parametrize(
    ("name", "scoring"),
    [
        ("olmoe", "softmax"),
        ("mixtral", "softmax"),
        ("gpt_oss", "softmax"),
        ("deepseek_v2", "softmax"),
        ("ernie4_5_moe", "softmax"),
        ("deepseek_v3", "sigmoid"),
        ("lfm2_moe", "sigmoid"),
        ("cohere2_moe_sigmoid", "sigmoid"),
        ("phimoe", None),
    ],
)
def test_what_a_router_makes_of_its_logits_is_told_from_the_weights(name, scoring):
    """Before any correction, group or scaling; and where the weights are no shares of anything, nothing is made up."""
    trace = trace_of(models.build(name))
    assert trace.scoring == scoring
    for record in trace.layers:
        if record.index is None:
            continue
        expected = {"softmax": record.router.softmax(1), "sigmoid": record.router.sigmoid(), None: None}[scoring]
        assert (record.probability is None) == (expected is None)
        if expected is not None:
            assert torch.equal(record.probability, expected)
            chosen = record.probability.gather(1, record.index)
            ratio = record.weight / chosen
            assert (ratio / ratio[:, :1] - 1).abs().max() < 1e-4, "one factor for all that a prompt is sent to"


def test_a_single_expert_tells_softmax_from_sigmoid_by_the_size_of_its_weight():
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(1, keepdim=True)
    for name, scores in (("softmax", logits.softmax(1)), ("sigmoid", logits.sigmoid()), (None, logits.exp())):
        assert scoring_of([(logits, best, 2.5 * scores.gather(1, best))]) == name
    shares = logits.softmax(1)
    assert scoring_of([(shares, best, shares.gather(1, best))]) == "none", "a router that gives probabilities itself"


def test_routers_of_two_kinds_are_none_that_is_known():
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    top = logits.topk(2).indices
    one, other = ((logits, top, scores.gather(1, top)) for scores in (logits.softmax(1), logits.sigmoid()))
    assert scoring_of([one, one]) == "softmax"
    assert scoring_of([one, other]) is None


def test_a_half_that_reads_two_residuals_is_refused():
    trace = trace_of(models.build("granitemoeshared"))
    trace.layers[1].bases["shared_mlp"] = trace.layers[1].bases["shared_mlp"] + 1
    with pytest.raises(DecompositionError, match="layer 1: its ffn part reads two residuals"):
        trace.verified()


def test_a_model_without_writers_is_refused():
    model = models.build("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(DecompositionError, match="no matrix that writes"):
        Decomposition(model)


def test_routed_rows_list_every_expert_once():
    index = torch.tensor([[0, 3], [3, 5], [0, 5], [2, 3]])
    found = {e: list(zip(rows.tolist(), slots.tolist(), strict=True)) for e, rows, slots in routed_rows(index)}
    assert found == {0: [(0, 0), (2, 0)], 2: [(3, 0)], 3: [(0, 1), (1, 0), (3, 1)], 5: [(1, 1), (2, 1)]}
