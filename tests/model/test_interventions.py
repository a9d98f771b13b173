"""Zeroing neurons is what deleting their weights in a copied model is, and leaves no trace."""

import contextlib
import copy

import pytest
import torch

from moescope import interventions, precision, routing
from moescope.decomposition import Decomposition, decoder_of
from moescope.interventions import InterventionError, Target, head, zeroed
from tests.model import models

IDS = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad(), precision.computing_in_float32(model):
        return model(IDS).logits


def cut(model, layer, kind, neurons, expert=None):
    """Delete the weights by name, knowing the families of this test."""
    block = decoder_of(model).layers[layer]
    with torch.no_grad():
        if kind == "attn":
            block.self_attn.o_proj.weight[:, neurons] = 0
        elif kind == "dense":
            block.mlp.down_proj.weight[:, neurons] = 0
        elif kind == "shared":
            block.mlp.shared_expert.down_proj.weight[:, neurons] = 0
        else:
            block.mlp.experts.down_proj[expert][:, neurons] = 0


CASES = [
    ("llama", "dense", None),
    ("olmo", "dense", None),
    ("qwen2_moe", "dense", None),
    ("olmoe", "routed", 4),
    ("olmoe_normed", "routed", 0),
    ("qwen2_moe", "routed", 5),
    ("qwen2_moe", "shared", None),
    ("llama", "attn", None),
    ("qwen2_moe", "attn", None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "kind", "expert"), CASES)
def test_zeroing_is_deleting_the_weights_and_comes_back(name, kind, expert, dtype):
    """All positions, every kind of site, however the weights are stored (a cast model rounds its rotary buffers, but
    so does its copy)."""
    model, neurons, layer = models.build(name, dtype=dtype), [3, 0, 17], 1 if kind == "dense" else 2
    if (name, kind) == ("olmoe", "routed"):  # make sure that somebody is routed to the expert
        with torch.no_grad():
            model.model.layers[layer].mlp.gate.weight[expert] *= 4
    clean, stored = logits(model), [p.clone() for p in model.parameters()]
    broken = copy.deepcopy(model)
    cut(broken, layer, kind, neurons, expert)
    with zeroed(Decomposition(model), [Target(layer, kind, neurons, expert)]):
        ablated = logits(model)
    assert torch.equal(ablated, logits(broken))
    assert not torch.equal(ablated, clean)
    assert all(torch.equal(a, b) for a, b in zip(stored, model.parameters(), strict=True))
    assert torch.equal(logits(model), clean)


@pytest.mark.parametrize("name", ["llama", "olmo", "olmoe", "qwen2_moe"])
def test_a_head_is_its_block_of_the_attention_output(name):
    """Zeroed head = its output cut out of what o_proj is given, at all positions."""
    model = models.build(name)
    decomposition = Decomposition(model)
    with zeroed(decomposition, [head(decomposition, 1, 2), head(decomposition, 0, 3)]):
        ablated = logits(model)
    hooks = []
    for layer, number in ((1, 2), (0, 3)):

        def silence(module, args, number=number):
            return torch.cat([x * (h != number) for h, x in enumerate(args[0].split(8, dim=-1))], -1)

        hooks.append(decoder_of(model).layers[layer].self_attn.o_proj.register_forward_pre_hook(silence))
    assert (logits(model) - ablated).abs().max() < 1e-5
    for hook in hooks:
        hook.remove()
    assert (logits(model) - ablated).abs().max() > 1e-2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_come_back_after_an_exception(error):
    """Overlapping targets too, and in the middle of an upcast forward pass."""
    model = models.build("qwen2_moe", dtype=torch.bfloat16)
    stored = [p.clone() for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    targets = [Target(0, "routed", [1, 2], 3), Target(0, "routed", [2, 5], 3), Target(1, "dense", range(48))]

    def interrupt(*_):
        raise error

    def broken_off():
        with zeroed(Decomposition(model), targets):
            assert not model.model.layers[0].mlp.experts.down_proj[3][:, [1, 2, 5]].any()
            logits(model)

    hook = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        broken_off()
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(stored, model.parameters(), strict=True))
    assert pointers == [p.data_ptr() for p in model.parameters()]


def test_the_bias_of_a_site_stays():
    model = models.build("llama", attention_bias=True, mlp_bias=True)
    every = [Target(i, kind, range(n)) for i in range(3) for kind, n in (("attn", 32), ("dense", 48))]
    seen = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, a, out: seen.append(out))
    with zeroed(Decomposition(model), every):
        logits(model)
    hook.remove()
    assert torch.equal(seen[0], model.model.layers[1].mlp.down_proj.bias.expand_as(seen[0]))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "no target is named"),
        ([Target(0, "dense", [0])], "layer 0, dense: the model has 0 such sites.*attn, routed, shared"),
        ([Target(3, "attn", [0])], "layer 3, attn: the model has 0 such sites; layers go from 0 to 2"),
        ([Target(0, "attn", [0]), Target(1, "dense", [])], "layer 1, dense: no neuron is named"),
        ([Target(0, "attn", [0]), Target(1, "dense", [4, 48])], "there is no neuron 48; neurons go from 0 to 47"),
        ([Target(0, "attn", [-1])], "there is no neuron -1"),
        ([Target(0, "routed", [0])], "name the expert of routed neurons"),
        ([Target(0, "shared", [0], 2)], "name the expert of routed neurons, and of no others"),
        ([Target(0, "routed", [0], 6)], "expert 6: experts go from 0 to 5"),
    ],
)
def test_what_is_not_there_is_an_error_and_nothing_changes(targets, message):
    model = models.build("qwen2_moe")
    stored = [p.clone() for p in model.parameters()]
    with pytest.raises(InterventionError, match=message), zeroed(Decomposition(model), targets):
        pass
    assert all(torch.equal(a, b) for a, b in zip(stored, model.parameters(), strict=True))


@pytest.mark.parametrize(("layer", "number"), [(0, 4), (0, -1), (3, 0)])
def test_a_head_that_is_not_there_is_an_error(layer, number):
    with pytest.raises(InterventionError, match=f"layer {layer} has no head {number}"):
        interventions.head(Decomposition(models.build("llama")), layer, number)


# ---- experts blocked position by position --------------------------------------------------------------------------

LAYER = 2
WAYS = ["reroute", "reroute_logit", "min_logit", "zero_weight"]
MIXTURES = ["olmoe", "olmoe_normed", "mixtral", "qwen2_moe", "deepseek_v3"]


def gave(model, blocked=None, how="zero_weight"):
    """What the experts of a layer are given when some are blocked: (index, weight) [N, K], K by their number."""
    with torch.no_grad(), contextlib.ExitStack() as within:
        decomposition = Decomposition(model)
        if blocked is not None:
            within.enter_context(interventions.block(decomposition, {LAYER: blocked}, how))
        with routing.watched(decomposition) as found:
            model(IDS)
    index, order = found[LAYER].index.sort(1)
    return index, found[LAYER].weight.gather(1, order)


def random_mask(seed=0):
    """One expert or none at every position."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-3, 6, (IDS.numel(),), generator=generator)
    mask = torch.zeros(IDS.numel(), 6, dtype=torch.bool)
    mask[numbers >= 0, numbers[numbers >= 0]] = True
    return mask


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mask_is_a_list_at_every_position(name, how):
    """Each position as when its own experts are blocked everywhere; those without any as when nobody is."""
    model, mask = models.build(name), random_mask()
    found, free = gave(model, mask, how), gave(model)
    lists = {tuple(row.nonzero()[:, 0].tolist()) for row in mask}
    assert () in lists
    assert len(lists) > 4
    moved = 0
    for experts in lists:
        alone = gave(model, list(experts), how) if experts else free
        here = torch.tensor([tuple(row.nonzero()[:, 0].tolist()) == experts for row in mask])
        for mine, its, clean in zip(found, alone, free, strict=True):
            assert torch.allclose(mine[here].double(), its[here].double(), rtol=1e-6, atol=0)
            moved += int((mine[here] != clean[here]).any(1).sum()) * bool(experts)
    assert moved > 2, "the case must arise: experts that were chosen"
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_a_mask_that_is_the_same_everywhere_is_a_list(name, how):
    model, mask = models.build(name), torch.zeros(IDS.numel(), 6, dtype=torch.bool)
    mask[:, 4] = True
    with torch.no_grad():
        found = []
        for blocked in (mask, [4], mask[:1]):
            with interventions.block(Decomposition(model), {1: blocked, LAYER: blocked}, how):
                found.append(model(IDS).logits)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[1])
    assert (found[0] - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("how", WAYS)
def test_a_mask_of_nobody_changes_nothing(how):
    model = models.build("mixtral")
    clean = logits(model)
    with interventions.block(Decomposition(model), {1: torch.zeros(IDS.numel(), 6, dtype=torch.bool)}, how):
        assert torch.equal(logits(model), clean)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((26, 6), "experts are named at 26 positions, 27 run; name them at each"),
        ((54, 6), "experts are named at 54 positions, 27 run"),
        ((27, 5), "layer 2: 5 experts by position, the layer has 6"),
        ((27, 7), "layer 2: 7 experts by position, the layer has 6"),
    ],
)
def test_a_mask_of_another_size_is_an_error(how, shape, message):
    model, mask = models.build("qwen2_moe"), torch.zeros(shape, dtype=torch.bool)
    mask[:, 0] = True
    with pytest.raises(InterventionError, match=message) as told, torch.no_grad():
        gave(model, mask, how)
    assert "\n" not in str(told.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("mask", [torch.zeros(27, 6), torch.zeros(6, dtype=torch.bool)])
def test_a_mask_of_another_kind_is_an_error(mask):
    """Numbers, and a mask without positions."""
    with pytest.raises(InterventionError, match="name experts as lists of numbers by layer"):
        gave(models.build("olmoe"), mask)


def test_a_mask_where_no_expert_routes_is_an_error():
    model = models.build("qwen2_moe")
    mask = torch.ones(27, 6, dtype=torch.bool)
    with pytest.raises(InterventionError, match="layer 1, routed, expert 0: the model has 0 such sites"):
        interventions.block(Decomposition(model), {1: mask}).__enter__()


def test_a_mask_that_leaves_too_few_at_one_position_is_an_error():
    mask = torch.zeros(27, 6, dtype=torch.bool)
    mask[13, :5] = True
    with pytest.raises(InterventionError, match="too few others can take their place"):
        gave(models.build("olmoe"), mask, "reroute")


@pytest.mark.parametrize("how", ["reroute", "min_logit"])
@pytest.mark.parametrize("blocked", [[0, 1, 2, 3], [2, 3, 4, 5], [6, 7, 8, 9]])
def test_a_group_that_is_left_with_too_few_is_an_error(blocked, how):
    """Two of its six experts for three slots: nobody of the group that lost may help out, whatever ``topk`` makes of
    scores that are all -inf."""
    model = models.build("glm4_moe", n_routed_experts=12, num_experts_per_tok=3)
    index, _ = gave(model)
    assert (index[:, 0] // 6 == blocked[0] // 6).any(), "the case must arise: a position that goes to this group"
    with pytest.raises(InterventionError, match="too few others can take their place"):
        gave(model, blocked, how)
