"""The final norm is measured right, whatever kind it is, and residuals are read as the model itself would."""

import copy

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from moescope import ablation, attribution, lpi
from moescope.clean import CleanRun
from moescope.decomposition import DecompositionError, decoder_of
from moescope.norms import Norm
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
        "granite": lambda z: z / 2.5,
        "cohere": lambda z: z * 0.25,
    }


@pytest.mark.parametrize("name", heads())
@torch.no_grad()
def test_scores_are_what_the_models_own_norm_and_head_say(name):
    """A neuron's vector is added to the residual that its branch read, and read by the model's own norm, rescaled to
    the statistic of the last residual, and its own head, in float64."""
    model, prompts = models.build(name), models.prompts()
    run = CleanRun.of(model, models.tokenizer(), prompts)
    wide = copy.deepcopy(model).double()
    norm, head, finish = decoder_of(wide).norm, wide.lm_head, heads()[name]
    measured = run.readout.norm

    def log_prob(residual, final, target):
        own = norm(residual[None])[0] * (measured.scale(final[None]) / measured.scale(residual[None]))
        return finish(head(own)).log_softmax(0)[target]

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


@pytest.mark.parametrize("name", [name for name in heads() if name != "cohere"])
@pytest.mark.parametrize("norm", ["final", "local"])
def test_layers_telescope_to_the_models_log_probability(name, norm):
    """The components of all layers of a sequential model add up to log p at its end less that at its beginning."""
    frames = attribution.attribute(models.build(name), models.tokenizer(), models.prompts(), norm=norm)
    total = frames["layers"].group_by("prompt_id").agg(pl.col("lpi").cast(pl.Float64).sum()).sort("prompt_id")
    read = frames["predictions"].sort("prompt_id").select(pl.col("log_prob") - pl.col("log_prob_h0"))
    assert np.abs(total["lpi"].to_numpy() - read.to_series().to_numpy()).max() < 2e-5


@pytest.mark.parametrize("name", ["olmo2", "granite"])
def test_ablation_refuses_branches_that_are_scaled(name):
    model, prompts = models.build(name), models.prompts()
    frames = attribution.attribute(model, models.tokenizer(), prompts)
    with pytest.raises(DecompositionError, match="which ablation does not support; leave the series out"):
        ablation.ablate(model, models.tokenizer(), prompts, frames)


def test_a_centring_norm_behind_a_branch_is_refused():
    model = models.build("olmo2")
    model.model.layers[1].post_feedforward_layernorm = nn.LayerNorm(32)
    with pytest.raises(DecompositionError, match="a norm behind a branch that centres or shifts"):
        attribution.attribute(model, models.tokenizer(), models.prompts())
