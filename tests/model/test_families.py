"""Every family of the zoo: taken apart, scored, ablated and rerouted as independent code says; the others refused."""

import re

import polars as pl
import pytest
import torch
import transformers
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

from moescope import ablation, attribution, interventions, selection
from moescope.decomposition import Decomposition, DecompositionError
from moescope.interventions import InterventionError
from moescope.models import require_fit
from moescope.readout import ReadoutError
from moescope.replay import ReplayError
from moescope.routing import RoutingError, watched
from moescope.targets import TargetError
from tests.examples import ROOT
from tests.model import families, models, references, support_table, zoo

#: What a family cannot do, and says so: its router makes no choice of the top k; its last position is another one when
#: it is run by itself, in transformers as in ours.
IMPOSSIBLE = {("phimoe", "reroute"), ("bamba", "effects")}
CASES = [(name, measure) for name in zoo.ZOO for measure in (*families.EVERYWHERE, *families.SEQUENTIAL)]
CASES += [(name, measure) for name in [*references.RULES, "phimoe"] for measure in families.WHERE_ROUTED]


@pytest.mark.parametrize(("name", "measure"), sorted(set(CASES) - IMPOSSIBLE))
def test_family(name: str, measure: str):
    case = families.Case.of(name)
    wanted = families.measures(case)
    if measure not in wanted:
        assert case.parallel
        assert measure == "telescoping"
        return
    assert families.measured(name, measure) <= wanted[measure][1]


def test_the_page_says_what_is_measured():
    """But for the digits of errors, which differ from machine to machine."""
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    plain = re.compile(r"\d(\.\d)?e-\d+|\d\.\de\+00|\b0\b")
    assert plain.sub("#", page) == plain.sub("#", support_table.text()), "run: make families"


def test_every_router_of_the_zoo_has_a_rule_of_its_own():
    routed = {name for name in zoo.ZOO if families.Case.of(name).sites("routed")}
    assert routed == {*references.RULES, "phimoe"}


def test_a_router_without_a_top_k_choice_says_so():
    case = families.Case.of("phimoe")
    with (
        pytest.raises(InterventionError, match=r"layer 1, experts \[2\]: their router has no scores"),
        interventions.reroute(case.decomposition, {1: [2]}),
    ):
        families.logits(case.model)
    assert torch.equal(families.logits(case.model), families.case_logits(case))


def test_a_last_position_that_cannot_be_run_by_itself_says_so():
    with pytest.raises(ReplayError, match="BambaForCausalLM: a pass taken up in the middle misses the whole one by"):
        families.effects(families.Case.of("bamba"))


# ---- refusals ------------------------------------------------------------------------------------------------------

#: What is said of a model that does not fit.
REFUSALS = {
    "bloom_post_norm": r"BloomForCausalLM: contributions miss the residual stream by \d\S+ of a layer's .* because the "
    "norm behind self_attention of layer 0 centres or shifts what it wrote",
    "opt_post_norm": "OPTForCausalLM: no final norm was found",
    "minimax": r"MiniMaxForCausalLM: contributions miss the residual stream by \d\S+ of a layer's update",
    "longcat_flash": "LongcatFlashForCausalLM: layer 0 has two attn parts",
    "nemotron_h_latent": r"NemotronHForCausalLM: what its layers do cannot be followed \(",
    "falcon_h1": "FalconH1ForCausalLM: layer 0 has two attn parts",
    "mamba2": "Mamba2ForCausalLM: no layer has a part of kind ffn",
    "jetmoe": "JetMoeForCausalLM: no matrix that writes to the residual stream was found",
    "llama4_text": r"Llama4ForCausalLM: contributions miss the residual stream by \d\S+ of a layer's update",
    "dbrx": r"DbrxForCausalLM: contributions miss the residual stream by \d\S+ of a layer's update",
    "gemma4_moe": r"Gemma4ForCausalLM: contributions miss the residual stream by \d\S+ of a layer's update",
}


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_what_does_not_fit_is_refused(name: str):
    with pytest.raises(DecompositionError, match=REFUSALS[name]):
        require_fit(zoo.build(name))


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma2", "nemotron_h"])
def test_what_fits_is_let_in_and_left_as_it_was(name: str):
    model = zoo.build(name)
    before = families.logits(model)
    assert require_fit(model) < 1e-5
    assert torch.equal(families.logits(model), before)


def test_packed_weights_are_refused():
    """By a module of transformers that holds eight bits and a scale, and by bits packed into bytes."""
    model = zoo.build("llama")
    model.model.layers[1].mlp.down_proj = FP8Linear(48, 32, block_size=(16, 16))
    with pytest.raises(DecompositionError, match=r"layer 1: mlp.down_proj is packed \(torch.float8_e4m3fn\); load"):
        Decomposition(model)
    weight = nn.Parameter(torch.zeros(32, 24, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].self_attn.o_proj.weight = weight
    with pytest.raises(DecompositionError, match=r"layer 0: self_attn.o_proj is packed \(torch.uint8\); load"):
        Decomposition(model)


def test_offloaded_weights_are_refused(tmp_path):
    zoo.build("llama").save_pretrained(tmp_path / "it")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "it", device_map={"": "disk"}, offload_folder=tmp_path / "away"
    )
    with pytest.raises(DecompositionError, match="weights are offloaded; load the model without CPU or disk offload"):
        Decomposition(model)


# ---- interventions on routers --------------------------------------------------------------------------------------


@pytest.fixture(params=["olmoe", "deepseek_v3", "gpt_oss"])
def case(request) -> families.Case:
    return families.Case.of(request.param)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("how", [*families.WAYS, "force"])
def test_a_router_comes_back_after_an_exception(case: families.Case, how: str, error: type[BaseException]):
    """In the middle of a forward pass too, one intervention within another."""
    layer, decomposition = families.layer_of(case.decomposition), case.decomposition
    stored = [p.clone() for p in case.model.parameters()]

    def intervene():
        if how == "force":
            return interventions.force(decomposition, layer, 1, 0.5)
        return interventions.block(decomposition, {layer: [0]}, how)

    def interrupt(*_):
        raise error

    last = decomposition.layers[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(error), interventions.zero_weight(decomposition, {layer: [2]}), intervene():
        families.logits(case.model)
    last.remove()
    assert torch.equal(families.logits(case.model), families.case_logits(case))
    assert all(torch.equal(a, b) for a, b in zip(stored, case.model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())
    assert "forward" not in vars(case.sites("routed")[0].router)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({}, "no expert is named"),
        ({1: []}, "no expert is named"),
        ({1: [6]}, "layer 1, routed, expert 6: experts go from 0 to 5"),
        ({1: [-1]}, "expert -1: experts go from 0 to 5"),
        ({1: 3}, r"\{1: 3\}: name experts as lists of numbers by layer"),
        ({1: ["3"]}, "name experts as lists of numbers by layer"),
        ([1], "name experts as lists of numbers by layer"),
        ({0: [1], 7: [0]}, "layer 7, routed, expert 0: the model has 0 such sites; layers go from 0 to 2"),
    ],
)
@pytest.mark.parametrize("how", families.WAYS)
def test_experts_that_are_not_there_are_an_error(how: str, experts: dict, message: str):
    case = families.Case.of("olmoe")
    with pytest.raises(InterventionError, match=message), interventions.block(case.decomposition, experts, how):
        pass
    assert torch.equal(families.logits(case.model), families.case_logits(case))


def test_a_dense_layer_routes_nothing():
    case = families.Case.of("deepseek_v3")
    with pytest.raises(InterventionError, match="layer 0, routed, expert 0: the model has 0 such sites"):
        interventions.force(case.decomposition, 0, 0, 1.0).__enter__()


def test_another_way_to_block_is_an_error():
    with pytest.raises(InterventionError, match="skip: experts are blocked by reroute, reroute_logit, min_logit, zero"):
        interventions.block(families.Case.of("olmoe").decomposition, {0: [1]}, "skip")


@pytest.mark.parametrize("how", ["reroute", "min_logit"])
def test_blocking_so_many_that_a_blocked_one_is_chosen_is_an_error(how: str):
    """Two are chosen of six: five cannot be done without."""
    case = families.Case.of("olmoe")
    with (
        pytest.raises(InterventionError, match=r"experts \[0, 1, 2, 3, 4\]: too few others can take their place"),
        interventions.block(case.decomposition, {1: range(5)}, how),
    ):
        families.logits(case.model)


def test_a_forced_expert_needs_a_weight_for_every_position():
    case = families.Case.of("olmoe")
    with (
        pytest.raises(InterventionError, match="layer 1, expert 0: 5 weights for 27 positions; give one for each"),
        interventions.force(case.decomposition, 1, 0, torch.ones(5)),
    ):
        families.logits(case.model)


def test_the_four_ways_to_block_differ_as_they_should():
    """Sums of weights in a router that does not normalise: its own is the largest; what a softmax shares out anew is
    more than what the next expert had, and a slot that nobody takes is the least of all."""
    case = families.Case.of("olmoe")
    clean = families.routings(case)[1]
    best = int(clean.index.flatten().bincount(minlength=6).argmax())
    hit = (clean.index == best).any(1)
    sums = {}
    for how in families.WAYS:
        with interventions.block(case.decomposition, {1: [best]}, how), watched(case.decomposition) as found:
            families.logits(case.model)
        sums[how] = found[1].weight.sum(1)[hit]
        if how in ("reroute", "zero_weight"):
            assert torch.equal(found[1].weight.sum(1)[~hit], clean.weight.sum(1)[~hit])
    assert (clean.weight.sum(1)[hit] > sums["reroute"]).all()
    assert (sums["reroute_logit"] > sums["min_logit"]).all()
    assert (sums["min_logit"] >= sums["reroute"]).all()
    assert (sums["reroute"] > sums["zero_weight"]).all()


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "hy_v3"])
def test_the_weight_an_expert_would_have_is_the_familys(name: str):
    """Of chosen experts it is their weight; of another, with the others kept, its score times the same factor."""
    case = families.Case.of(name)
    routing = families.routings(case)[2]
    for e in range(6):
        weight = routing.weight_of(e)
        where = routing.index == e
        assert torch.allclose(weight[where.any(1)], routing.weight[where], rtol=1e-5)
    chosen = routing.probability.gather(1, routing.index)
    factor = (routing.weight / chosen)[:, 0]
    assert torch.allclose(routing.weight_of(3), routing.probability[:, 3] * factor, rtol=1e-5)


def test_an_expert_that_is_not_there_would_have_no_weight():
    routing = families.routings(families.Case.of("olmoe"))[0]
    for e in (-1, 6):
        with pytest.raises(RoutingError, match=f"there is no expert {e}; experts go from 0 to 5"):
            routing.weight_of(e)


def test_no_weight_is_made_up_where_there_is_no_probability():
    routing = families.routings(families.Case.of("phimoe"))[0]
    assert routing.probability is None
    with pytest.raises(RoutingError, match="no shares of a probability"):
        routing.weight_of(0)


def test_forcing_an_expert_to_its_own_weight_where_it_is_chosen_changes_nothing():
    case = families.Case.of("olmoe")
    routing = families.routings(case)[1]
    chosen = (routing.index == 3).any(1)
    weight = torch.where(chosen, routing.weight_of(3), 0)
    with interventions.force(case.decomposition, 1, 3, weight):
        assert families.difference(families.logits(case.model), families.case_logits(case)) < 1e-5


def test_probability_is_null_where_there_is_none():
    frames = families.Case.of("phimoe").frames
    assert frames["routing"]["probability"].is_null().all()
    assert frames["routing"]["weight"].is_not_null().all()


def test_neurons_of_a_mixer_without_heads_have_no_head():
    frames = families.Case.of("lfm2_moe").frames
    per_layer = frames["attn_neurons"].group_by("layer").agg(pl.col("head").null_count() == pl.len()).sort("layer")
    assert per_layer["head"].to_list() == [True, False, True]
    assert frames["heads"]["layer"].unique().to_list() == [1]


def test_a_layer_without_heads_has_none_to_zero():
    with pytest.raises(InterventionError, match="layer 0 has no head 0: it has 0"):
        interventions.head(families.Case.of("lfm2_moe").decomposition, 0, 0)


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_what_asks_for_care_is_in_the_report(name: str):
    """Parallel halves are told by the residuals that they read: those that are listed by hand, and no others."""
    remarks = families.Case.of(name).report["remarks"]
    assert ("parallel" in remarks) == (name in zoo.PARALLEL)
    assert ("router of its own" in remarks) == (name == "phimoe")


def test_a_weight_that_is_no_number_is_not_forced():
    case = families.Case.of("olmoe")
    with (
        pytest.raises(InterventionError, match="layer 1, expert 0: a weight is no number"),
        interventions.force(case.decomposition, 1, 0, float("nan")),
    ):
        families.logits(case.model)


def test_a_tokenizer_of_another_model_is_told():
    with pytest.raises(TargetError, match=r"the tokenizer makes token \d+, the model knows 40; load the tokenizer"):
        attribution.attribute(zoo.build("llama", vocab_size=40), models.tokenizer(), models.prompts())


def test_a_half_that_a_layer_lacks_adds_nothing():
    """Layers of one part each: a row for both halves of every layer all the same."""
    case = families.Case.of("nemotron_h")
    layers = case.frames["layers"]
    assert len(layers) == len(case.run.prompts) * len(case.decomposition.layers) * 2
    there = {(i, half) for i in range(len(case.decomposition.layers)) for half in case.decomposition.components(i)}
    sizes = layers.group_by("layer", "component").agg(pl.col("lpi").abs().max())
    assert {(i, half) for i, half, size in sizes.rows() if size > 0} == there
    assert len(there) == len(case.decomposition.layers)


# ---- what no family of the zoo shows -------------------------------------------------------------------------------


def attention(name: str, **over: object) -> list[tuple[int, int]]:
    """(heads, width of one) in every layer."""
    sites = Decomposition(zoo.build(name, **over)).sites
    return [(site.heads, site.neurons // site.heads) for site in sites if site.kind == "attn"]


def test_heads_are_those_of_the_layer():
    """More of them in one layer than in another, values narrower than keys, two heads that one norm joins."""
    over = {**zoo.MOE, "head_dim": 8, "shared_expert_intermediate_size": 24}
    assert attention("laguna", **over, num_attention_heads_per_layer=[4, 6, 4]) == [(4, 8), (6, 8), (4, 8)]
    assert attention("deepseek_v3") == [(4, 6)] * 3
    assert attention("diffllama") == [(2, 16)] * 3


def test_a_normalised_weight_of_one_expert_tells_nothing():
    model = zoo.build("deepseek_v3", num_experts_per_tok=1)
    with watched(Decomposition(model)) as found:
        families.logits(model)
    assert found[1].probability is None
    with pytest.raises(RoutingError, match="no shares of a probability"):
        found[1].weight_of(2)


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_the_weight_an_expert_would_have_is_known_in_bfloat16_too(name: str):
    """What a notebook does with a model as it is stored; rounded weights are shares all the same."""
    model = zoo.build(name, dtype=torch.bfloat16)
    decomposition = Decomposition(model)
    with watched(decomposition) as found:
        families.logits(model)
    layer = families.layer_of(decomposition)
    routing, e = found[layer], int(found[layer].index[0, 0])
    where = routing.index == e
    assert torch.allclose(routing.weight_of(e)[where.any(1)], routing.weight[where].float(), rtol=2e-2)
    with interventions.force(decomposition, layer, e, routing.weight_of(e)):
        families.logits(model)


def test_forcing_twice_is_forcing_once():
    case = families.Case.of("olmoe")
    with interventions.force(case.decomposition, 1, 3, 0.5):
        once = families.logits(case.model)
        with interventions.force(case.decomposition, 1, 3, 0.5):
            assert torch.equal(families.logits(case.model), once)
        with interventions.force(case.decomposition, 1, 3, 0.7):
            last = families.logits(case.model)
    with interventions.force(case.decomposition, 1, 3, 0.7):
        assert families.difference(families.logits(case.model), last) < 1e-5


def test_tables_of_a_model_with_a_forced_expert_say_so():
    case = families.Case.of("olmoe")
    with interventions.force(case.decomposition, 1, 3, 0.7):
        frames = attribution.attribute(case.model, models.tokenizer(), models.prompts())
    forced = frames["routing"].filter(pl.col("layer") == 1, pl.col("expert") == 3)
    assert forced["weight"].to_list() == pytest.approx([0.7] * len(case.run.prompts))
    active = frames["ffn_neurons"].filter(pl.col("layer") == 1, pl.col("expert") == 3)["active"]
    assert set(active) == {len(case.run.prompts)}


def test_what_is_watched_is_what_is_used_whoever_came_first():
    case = families.Case.of("olmoe")
    best = int(families.routings(case)[1].index[0, 0])
    with watched(case.decomposition) as found, interventions.zero_weight(case.decomposition, {1: [best]}):
        families.logits(case.model)
    assert not found[1].weight[found[1].index == best].any()


def test_a_router_that_softens_its_logits_is_not_rerouted_by_logit():
    """A cap makes a finite number of -inf: such an expert would keep a weight."""
    over = {**zoo.MOE, "head_dim": 8, "shared_expert_intermediate_size": 24, "moe_router_logit_softcapping": 0.1}
    model = zoo.build("laguna", **over)
    decomposition = Decomposition(model)
    layer = families.layer_of(decomposition)
    favoured = int(decomposition.at(layer, "routed")[0].router.e_score_correction_bias.argmax())
    with (
        pytest.raises(InterventionError, match="gives them a weight all the same"),
        interventions.reroute_logit(decomposition, {layer: [favoured]}),
    ):
        families.logits(model)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (torch.zeros(3, 2), "their router does not say what it chose"),
        ((torch.zeros(3, 6), torch.full((3, 2), torch.nan), torch.ones(3, 2).long()), "weights that are no numbers"),
    ],
)
def test_a_router_that_says_something_else_is_refused(said: object, message: str):
    decomposition = Decomposition(zoo.build("olmoe"))
    router = decomposition.at(1, "routed")[0].router
    logits, router.forward = router.forward, lambda hidden: (logits(hidden), said)[1]
    with (
        pytest.raises(InterventionError, match=message),
        interventions.min_logit(decomposition, {1: [0]}),
    ):
        router(torch.zeros(3, 32))


def test_a_part_that_reads_a_copy_of_a_normed_residual_is_refused():
    """Its own numbers would be right, but not the residual that scores are read from."""
    model = zoo.build("llama")
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda m, args: (args[0] * 1.0,))
    with pytest.raises(DecompositionError, match="layer 0: its ffn part does not read the residual stream as it is"):
        require_fit(model)


def test_a_layer_that_is_run_twice_is_refused():
    model = zoo.build("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(DecompositionError, match="what layer 0 leaves is not what comes next"):
        require_fit(model)


def test_logits_that_no_residual_explains_are_refused_on_load():
    model = zoo.build("llama")
    model.lm_head.register_forward_hook(lambda m, args, out: out + 0.01 * out.square())
    with pytest.raises(ReadoutError, match="logits are not an affine map"):
        require_fit(model)


def test_one_layer_whose_weights_are_no_shares_is_enough_to_know_none():
    case = families.Case.of("olmoe")
    trace = case.decomposition.trace(case.run.batches)
    trace.layers[2].weight = trace.layers[2].weight.square()
    trace.scoring = None
    trace.read_routers()
    assert trace.scoring is None


# ---- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode", "n", "weights", "message"),
    [
        ("olmoe", "top_n", 3, "keep", "top_n 3: the router fills 2 slots, counted from 1"),
        ("olmoe", "only_rank", 0, "family", "only_rank 0: the router fills 2 slots"),
        ("olmoe", "drop_rank", 3, "family", "drop_rank 3: the router fills 2 slots"),
        ("olmoe", "best", 1, "keep", "best, keep: slots are top_n, only_rank, drop_rank, weights family or keep"),
        ("olmoe", "top_n", 1, "none", "top_n, none: slots are"),
        ("llama", "top_n", 1, "keep", "no layer routes between experts; name a mixture of experts"),
    ],
)
def test_a_budget_that_cannot_be_is_an_error(name: str, mode: str, n: int, weights: str, message: str):
    case = families.Case.of(name)
    with pytest.raises(InterventionError, match=message), interventions.slots(case.decomposition, mode, n, weights):
        families.logits(case.model)
    assert torch.equal(families.logits(case.model), families.case_logits(case))


def test_a_budget_by_the_familys_rule_needs_to_know_it():
    with pytest.raises(
        InterventionError, match="whether weights are normalised is not known; trace some prompts first"
    ):
        interventions.slots(Decomposition(zoo.build("olmoe")), "top_n", 1)


@pytest.mark.parametrize("name", ["olmoe", "olmoe_normed", "mixtral", "gpt_oss", "granitemoe", "qwen2_moe"])
def test_the_top_slots_are_what_a_router_gives_that_fills_fewer(name: str):
    """At all layers, by the family's own rule: logits equal those of a model with another top k."""
    case, fewer = families.Case.of(name), zoo.build(name)
    for module in fewer.modules():
        if getattr(module, "top_k", None) == 2:
            module.top_k = 1
    with interventions.slots(case.decomposition, "top_n", 1):
        assert families.difference(families.logits(case.model), families.logits(fewer)) < 1e-4
    assert families.difference(families.logits(fewer), families.case_logits(case)) > 1e-2


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "granitemoeshared", "ernie4_5_moe", "hunyuan_v1_moe"])
def test_without_a_shared_expert_is_a_model_whose_shared_expert_is_nothing(name: str):
    case, broken = families.Case.of(name), zoo.build(name)
    with torch.no_grad():
        for site in case.sites("shared"):
            module = broken.get_submodule(case.path(site.module))
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    with interventions.without_shared(case.decomposition):
        assert families.difference(families.logits(case.model), families.logits(broken)) < 1e-5
    assert torch.equal(families.logits(case.model), families.case_logits(case))
    assert families.difference(families.logits(broken), families.case_logits(case)) > 1e-2


def test_no_shared_expert_is_an_error():
    with (
        pytest.raises(InterventionError, match="no layer has a shared expert"),
        interventions.without_shared(families.Case.of("olmoe").decomposition),
    ):
        pass


@pytest.mark.parametrize("sure", [1.0, 50.0])
def test_whether_a_router_normalises_is_known_though_it_is_sure_of_its_choice(sure: float):
    """Its probabilities then add up to 1 wherever one looks, normalised or not."""
    for name, normalises in (("olmoe", False), ("olmoe_normed", True), ("deepseek_v2", False), ("phimoe", False)):
        model = zoo.build(name)
        with torch.no_grad():
            for site in Decomposition(model).routed():
                site.router.weight.mul_(sure)
        decomposition = Decomposition(model)
        decomposition.trace(families.Case.of(name).run.batches)
        assert set(decomposition.normalises.values()) == {normalises}, name


@pytest.mark.parametrize("name", ["deepseek_v3", "olmoe"])
def test_a_run_with_blocked_experts_asks_the_family_for_its_rule(name: str):
    """Of nothing to read, groups are chosen by the correction alone, and a blocked expert may be hard to do without."""
    case = families.Case.of(name)
    layer = families.layer_of(case.decomposition)
    for e in range(6):
        decomposition = Decomposition(case.model)
        with interventions.reroute(decomposition, {layer: [e]}):
            decomposition.trace(case.run.batches).verified()
        assert decomposition.normalises == case.decomposition.normalises


@torch.no_grad()
@pytest.mark.parametrize("name", ["olmo2", "granite", "llama"])
def test_the_share_that_is_removed_is_that_of_what_reaches_the_stream(name: str):
    """Behind a norm or a multiplier too, from the model's own modules: |part|^2 over |F|^2, summed over layers."""
    case = families.Case.of(name)
    found = ablation.ablate(case.model, models.tokenizer(), case.run.prompts, case.frames, seeds=1)["ablations"]
    plan = selection.plan(case.frames, case.run.prompts, ("signed",), seeds=1, seed=0)
    which = next(i for i in plan.interventions if (i.site, i.size, i.control) == ("ffn_neuron", "3%", "none"))
    units = plan.index["ffn_neuron"][which.units]
    rows = found.filter(pl.col("size") == "3%", pl.col("control") == "none", pl.col("fold").eq_missing(which.fold))
    expected = dict(rows.select("prompt_id", "removed").rows())
    for p in which.prompts.tolist():
        part = whole = 0.0
        for i, layer in enumerate(case.model.model.layers):
            read, norm = [], getattr(layer, "post_feedforward_layernorm", None)
            hook = layer.mlp.down_proj.register_forward_pre_hook(lambda m, args, to=read: to.append(args[0][0, -1]))
            families.logits(case.model, torch.tensor([case.run.targets[p].tokens]))
            hook.remove()
            c, weight = read[0].double(), layer.mlp.down_proj.weight.double()
            scale = getattr(layer, "residual_multiplier", 1.0)
            if norm is not None:
                y = weight @ c
                scale = norm.weight.double() / (y.square().mean() + norm.variance_epsilon).sqrt()
            mine = units.filter(pl.col("layer") == i)["neuron"].to_list()
            part += (scale * (weight[:, mine] @ c[mine])).square().sum().item()
            whole += (scale * (weight @ c)).square().sum().item()
        assert expected[case.run.prompts["prompt_id"][p]] == pytest.approx(part / whole, rel=1e-4)
