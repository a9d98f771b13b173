"""The final norm is measured right, whatever kind it is."""

import pytest
import torch
from torch import nn

from moescope.norms import Norm


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
