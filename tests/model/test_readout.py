"""The final norm is measured right, whatever kind it is, and residuals are read as the model itself would."""

import copy

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from torch import nn

from moescope import attribution, lpi
from moescope.clean import CleanRun
from moescope.decomposition import Decomposition, DecompositionError
from moescope.norms import Norm
from moescope.readout import ReadoutError
from tests.model import models


class OnePlus(nn.Module):
    """Gemma's norm: 1 + w."""

    def __init__(self, d):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.randn(d)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * (1 + self.weight)


def norms():
    torch.manual_seed(0)
    full, bare = nn.LayerNorm(33, eps=1e-5), nn.LayerNorm(33, eps=1e-5, elementwise_affine=False)
    rms = nn.RMSNorm(33, eps=1e-6)
    nn.init.normal_(full.weight), nn.init.normal_(full.bias), nn.init.normal_(rms.weight)
    return {"layer norm": full, "layer norm without parameters": bare, "rms": rms, "one plus": OnePlus(33)}


@pytest.mark.parametrize("name", norms())
def test_a_final_norm_is_measured_whatever_it_is(name):
    """gain * (centred x) / sigma + bias reproduces the module, at large and at tiny residuals (where eps matters)."""
    norm = norms()[name]
    found = Norm.of(norm, torch.zeros(33))
    assert found.centred == name.startswith("layer")
    for size in (1e-3, 1.0, 1e3):
        x = size * torch.randn(7, 33) + 0.5 * size
        y = x - x.mean(1, keepdim=True) if found.centred else x
        mine = y.double() * found.scale(x)[:, None] * found.gain + found.bias
        assert torch.allclose(mine.float(), norm(x), rtol=2e-4, atol=2e-5)


def heads():
    """family -> what it does with the logits of its head."""
    same = lambda z: z  # noqa: E731
    return {
        "llama": same,
        "olmo2": same,
        "flex_olmo": same,
        "gemma2": lambda z: 4 * torch.tanh(z / 4),
        "gemma3_text": lambda z: 3 * torch.tanh(z / 3),
        "granite": lambda z: z / 2.5,
        "granitemoe": lambda z: z / 2.5,
        "cohere": lambda z: z * 0.25,
        "hyperclovax": lambda z: z * 0.6,
        "gpt_neox": same,
        "phi": same,
        "glm4": same,
    }


#: Families whose two branches read the same residual.
PARALLEL = {"cohere", "gpt_neox", "phi"}


@pytest.mark.parametrize("name", heads())
def test_the_read_out_of_the_last_residual_is_the_models_own(name):
    run = CleanRun.of(models.build(name), models.tokenizer(), models.prompts())
    mine = run.readout.unembedding.log_probs(run.trace.final, run.readout.scale)
    assert (mine - run.trace.logits.double().log_softmax(-1)).abs().max() < 1e-5
    assert torch.allclose(run.readout.log_prob(run.trace.final), mine.gather(1, run.target[:, None])[:, 0], atol=1e-12)


@pytest.mark.parametrize("name", ["granite", "cohere", "hyperclovax", "gemma2"])
def test_a_bias_of_the_head_is_scaled_and_capped_with_its_logits(name):
    model = models.build(name)
    head = nn.Linear(32, len(model.lm_head.weight))
    nn.init.normal_(head.bias)
    head.weight = model.lm_head.weight
    model.lm_head = head
    run = CleanRun.of(model, models.tokenizer(), models.prompts())
    mine = run.readout.unembedding.log_probs(run.trace.final, run.readout.scale)
    assert (mine - run.trace.logits.double().log_softmax(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_factor_of_the_logits_is_measured_whatever_its_name(cap):
    """A factor that no configuration names; the unembedding holds it to the precision of float32."""
    model = models.build("gemma2", final_logit_softcapping=cap)
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: 0.37 * head(x)
    readout = CleanRun.of(model, models.tokenizer(), models.prompts()).readout
    assert readout.unembedding.cap == cap
    expected = 0.37 * model.lm_head.weight * readout.norm.gain
    assert torch.allclose(readout.unembedding.weight, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrong", [lambda z: z * (1 + 0.02 * z[..., :1].sigmoid()), lambda z: z + 0.01 * z.square()])
def test_logits_that_no_factor_and_no_cap_explain_are_refused(wrong):
    """A temperature that depends on the prompt; a curved map."""
    model = models.build("granite")
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: wrong(head(x))
    with pytest.raises(ReadoutError, match=r"GraniteForCausalLM: logits are not an affine map .* \(off by .* nats\)"):
        CleanRun.of(model, models.tokenizer(), models.prompts())


def test_a_final_norm_that_is_none_is_refused():
    """Root mean square in probes, but another power of it at other sizes."""
    model = models.build("llama")
    norm = model.model.norm.forward
    model.model.norm.forward = lambda x: norm(x) * x.square().mean(-1, keepdim=True).clamp(min=2).log2()
    with pytest.raises(ReadoutError, match="not an affine map"):
        CleanRun.of(model, models.tokenizer(), models.prompts())


@pytest.mark.parametrize("name", ["olmo2", "gemma2", "granitemoe"])
def test_weights_stored_in_bfloat16_give_the_float32_results(name):
    """Gains are measured and folded in while the norms compute in float32, and the stored weights stay as they are."""
    stored = models.build(name, dtype=torch.bfloat16)
    for key, buffer in models.build(name).named_buffers():  # casting rounds them, loading a checkpoint does not
        stored.get_submodule(key.rpartition(".")[0])._buffers[key.rpartition(".")[2]] = buffer
    whole = copy.deepcopy(stored).float()
    before = [p.clone() for p in stored.parameters()]
    one, two = (attribution.attribute(m, models.tokenizer(), models.prompts()) for m in (stored, whole))
    for table in one:
        assert_frame_equal(one[table], two[table], check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip(before, stored.parameters(), strict=True))


@pytest.mark.parametrize("name", heads())
@torch.no_grad()
def test_scores_are_what_the_models_own_norm_and_head_say(name):
    """A neuron's vector is added to the residual that its branch read, and read by the model's own norm, rescaled to
    the statistic of the last residual, and its own head, in float64."""
    model, prompts = models.build(name), models.prompts()
    run = CleanRun.of(model, models.tokenizer(), prompts)
    wide = copy.deepcopy(model).double()
    norm, head, finish = Decomposition(wide).norm, wide.get_output_embeddings(), heads()[name]
    measured = run.readout.norm

    def log_prob(residual, final, target):
        bias = getattr(norm, "bias", None)  # no part of what the statistic divides
        bias = 0 if bias is None else bias
        own = norm(residual[None])[0] - bias
        frozen = own * (measured.scale(final[None]) / measured.scale(residual[None])) + bias
        return finish(head(frozen)).log_softmax(0)[target]

    for site in run.decomposition.at(1):
        record = run.trace.layers[1]
        base = run.readout.base(record.bases[site.branch])
        c = record.coefficients[site.name]
        if site.kind == "routed":
            c, values = c[:, 0], [site.values(int(e)) for e in record.index[:, 0]]
            parts = [lpi.Neurons(v, c[[p]], torch.tensor([p])) for p, v in enumerate(values)]
            found = torch.cat(run.readout.of_neurons(base, parts, lpi.Certificate()))
        else:
            values = [site.values()] * len(c)
            (found,) = run.readout.of_neurons(base, [lpi.Neurons(values[0], c)], lpi.Certificate())
        for p in range(0, len(prompts), 3):
            final, target = run.trace.final[p].double(), run.target[p]
            residual = record.bases[site.branch][p].double()
            before = log_prob(residual, final, target)
            for j in range(0, c.shape[1], 5):
                truth = log_prob(residual + c[p, j].double() * values[p][j].double(), final, target) - before
                assert abs(found[p, j] - truth) <= 3e-6 * (1 + abs(truth)), (site, p, j)


@pytest.mark.parametrize("name", [name for name in heads() if name not in PARALLEL])
@pytest.mark.parametrize("norm", ["final", "local"])
def test_layers_telescope_to_the_models_log_probability(name, norm):
    """The components of all layers of a sequential model add up to log p at its end less that at its beginning."""
    frames = attribution.attribute(models.build(name), models.tokenizer(), models.prompts(), norm=norm)
    total = frames["layers"].group_by("prompt_id").agg(pl.col("lpi").cast(pl.Float64).sum()).sort("prompt_id")
    read = frames["predictions"].sort("prompt_id").select(pl.col("log_prob") - pl.col("log_prob_h0"))
    assert np.abs(total["lpi"].to_numpy() - read.to_series().to_numpy()).max() < 2e-5


def test_a_centring_norm_behind_a_branch_is_refused():
    """With the measured error, and with the reason."""
    model = models.build("olmo2")
    model.model.layers[1].post_feedforward_layernorm = nn.LayerNorm(32)
    why = r"by \d\S+ of a layer's update .* because the norm behind mlp of layer 1 centres or shifts what it wrote"
    with pytest.raises(DecompositionError, match=why):
        attribution.attribute(model, models.tokenizer(), models.prompts())
