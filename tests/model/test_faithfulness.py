"""The true effect of single neurons at the last position, against copied models that lack them there."""

import copy

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from moescope import attribution, clean, faithfulness, precision, replay, targets
from moescope.decomposition import decoder_of
from tests.model import models

#: Norms behind branches and multipliers of them too, and recurrent layers.
FAMILIES = ["llama", "olmo", "olmoe", "qwen2_moe", "olmo2", "flex_olmo", "granitemoe", "lfm2_moe", "qwen3_next"]
IDS = ["layer", "kind", "expert", "neuron"]


def measured(model, prompts, neurons, frames=None, seed=0):
    frames = frames or attribution.attribute(model, models.tokenizer(), prompts)
    with torch.no_grad(), precision.computing_in_float32(model):
        run = clean.CleanRun.of(model, models.tokenizer(), prompts)
        return frames, faithfulness.faithfulness(run, frames, neurons, seed)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    model = models.build(request.param)
    frames, found = measured(model, models.prompts(), 40)
    return model, frames, found["faithfulness"], found["faithfulness_prompts"]


def broken_part(model, row):
    """A copy of a feed-forward part without one neuron."""
    part = copy.deepcopy(feed_forward(model, row["layer"]))
    with torch.no_grad():
        if row["kind"] == "routed":
            part.experts.down_proj[row["expert"], :, row["neuron"]] = 0
        else:
            mlp = part.shared_expert if row["kind"] == "shared" else part
            (mlp.w2 if hasattr(mlp, "w2") else mlp.down_proj).weight[:, row["neuron"]] = 0
    return part


def feed_forward(model, layer):
    names = ("mlp", "block_sparse_moe", "feed_forward")
    return next(part for name, part in decoder_of(model).layers[layer].named_children() if name in names)


def log_prob(model, target, row=None, share=1.0):
    """log p(target) of one prompt, a neuron taken away (by a share) at its last position: a whole forward pass."""
    hooks = []
    if row is not None:
        part = broken_part(model, row)

        def lessen(module, args, out):
            out = out.clone()
            out[:, -1] += share * (part(args[0])[:, -1] - out[:, -1])
            return out

        hooks.append(feed_forward(model, row["layer"]).register_forward_hook(lessen))
    logits = model(torch.tensor([target.tokens])).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return logits.double().log_softmax(-1)[target.target_id]


def test_effect_and_gradient_against_whole_passes(case):
    """One neuron, one prompt, one copied model; the gradient is that of taking away a small share of the neuron."""
    model, _, _, rows = case
    wanted = {t.prompt_id: t for t in targets.find(models.tokenizer(), models.prompts().to_dicts())}
    large = 0
    for row in rows.sample(min(len(rows), 90), seed=0).to_dicts():
        target = wanted[row["prompt_id"]]
        with torch.no_grad():
            truth = (log_prob(model, target) - log_prob(model, target, row)).item()
        assert row["effect"] == pytest.approx(truth, abs=1e-5)
        share = torch.zeros((), requires_grad=True)
        (slope,) = torch.autograd.grad(log_prob(model, target, row, share), share)
        assert row["gradient"] == pytest.approx(-slope.item(), rel=1e-3, abs=1e-5)
        large += abs(truth) > 1e-3
    assert large > 20, "the case must arise: neurons that matter"


def test_prompts_are_those_in_which_a_neuron_is_active(case):
    """Activity, mean LPI and magnitude are those of ``ffn_neurons``; routed neurons only where the expert is chosen."""
    _, frames, means, rows = case
    prompts = len(models.prompts())
    known = frames["ffn_neurons"]
    joined = means.join(known, on=IDS, nulls_equal=True, suffix="_known")
    assert len(joined) == len(means) == 40
    assert (joined["active"] == joined["active_known"]).all()
    assert (joined["lpi"] * joined["active"] / prompts - joined["importance"]).abs().max() < 1e-6
    assert (joined["magnitude"] * joined["active"] / prompts - joined["magnitude_known"]).abs().max() < 1e-6
    if "routing" in frames:
        chosen = frames["routing"].filter(pl.col("slot").is_not_null())
        routed = rows.filter(pl.col("kind") == "routed")
        sent = routed.join(chosen, on=["prompt_id", "layer", "expert"], how="semi")
        assert 0 < len(routed) == len(sent)
    for row in means.to_dicts():
        mine = rows.filter(pl.all_horizontal(pl.col(i).eq_missing(row[i]) for i in IDS))
        assert len(mine) == row["active"] == mine["prompt_id"].n_unique()
        for name in ("effect", "lpi", "gradient", "magnitude"):
            assert row[name] == pytest.approx(mine[name].cast(pl.Float64).mean(), rel=1e-5, abs=1e-9)


def test_where_lpi_must_be_faithful_it_is():
    """The last layer's only neuron behind a norm that hardly looks at the residual (its eps dwarfs it): the frozen norm
    is the norm, the base residual is the residual without the neuron, so that LPI is the effect."""
    model = models.build("llama", intermediate_size=1)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.dim() == 2:
                parameter *= 0.3
    model.model.norm.variance_epsilon = 100.0
    with torch.no_grad():
        model.model.norm.weight *= 10
    _, found = measured(model, models.prompts(), 40)
    assert len(found["faithfulness"]) == 3
    rows = found["faithfulness_prompts"].filter(pl.col("layer") == 2)
    assert rows["effect"].abs().max() > 1e-3
    assert (rows["effect"] - rows["lpi"]).abs().max() < 0.03 * rows["effect"].abs().max()
    earlier = found["faithfulness_prompts"].filter(pl.col("layer") == 0)
    assert (earlier["effect"] - earlier["lpi"]).abs().max() > 0.03 * earlier["effect"].abs().max()


def test_results_do_not_depend_on_how_rows_are_batched(monkeypatch):
    model, prompts = models.build("qwen2_moe"), models.prompts(2)
    frames, together = measured(model, prompts, 30)
    monkeypatch.setattr(faithfulness, "_ROWS", 3)
    monkeypatch.setattr(faithfulness, "_PROMPTS", 1)
    _, alone = measured(model, prompts, 30, frames)
    for name, frame in together.items():
        assert_frame_equal(frame, alone[name], abs_tol=1e-5, rel_tol=1e-4)
    _, other = measured(model, prompts, 30, frames, seed=1)
    assert not other["faithfulness"].select(IDS).equals(together["faithfulness"].select(IDS))


def test_weights_stored_in_bfloat16_give_the_float32_results():
    stored = models.build("qwen2_moe", dtype=torch.bfloat16)
    whole = copy.deepcopy(stored)
    for parameter in whole.parameters():
        parameter.data = parameter.data.float()
    frames, one = measured(stored, models.prompts(), 20)
    _, two = measured(whole, models.prompts(), 20, frames)
    for name, frame in one.items():
        assert_frame_equal(frame, two[name], abs_tol=1e-5, rel_tol=1e-4)


def test_cost_is_one_token_a_row():
    """Nothing but the last position runs once keys and values are there."""
    model, tokens = models.build("olmoe"), []
    hook = model.model.layers[-1].register_forward_pre_hook(lambda m, args: tokens.append(args[0].shape[1]))
    with torch.no_grad():
        last = replay.LastPosition(clean.Decomposition(model), torch.randint(3, 300, (4, 8)), torch.arange(4))
        tokens.clear()
        last.log_prob(0, torch.randn(6, 32), torch.tensor([0, 1, 1, 2, 3, 3]))
    hook.remove()
    assert tokens == [1]
