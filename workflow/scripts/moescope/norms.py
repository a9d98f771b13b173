"""A norm, measured from what it puts out: neither the name of its weight nor of its eps matters, nor whether its gain
is w or 1 + w."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Norm:
    """A norm as x -> gain * (x - mean(x) if centred) / sigma(x) + bias, sigma = sqrt(mean square + eps).

    ``gain`` and ``bias`` [d] float32. Measured from the module's outputs on probes, so that neither the name of its
    weight nor of its eps matters, nor whether the gain is w or 1 + w.
    """

    gain: Tensor
    bias: Tensor
    centred: bool
    eps: float

    @classmethod
    @torch.no_grad()
    def of(cls, norm: nn.Module, like: Tensor) -> Norm:
        """Measure a norm for residuals of the size and device of ``like`` [d]."""
        zero, one = torch.zeros_like(like), torch.ones_like(like)
        spread = one - 2 * (torch.arange(len(like), device=like.device) % 2)  # +1, -1, ...: nowhere near 0
        spread = spread - spread.mean()
        spread = spread / spread.square().mean().sqrt()  # mean 0, mean square 1: the same for both kinds of norm
        bias = norm(zero[None])[0].float()
        small = 3e-3  # comparable to the square root of usual eps, so that their ratio tells eps
        full, faint = (norm(k * spread[None])[0].float() - bias for k in (1.0, small))
        ratio = (faint.abs().sum() / full.abs().sum()).double().square().item()
        eps = max(0.0, small**2 * (1 - ratio) / max(ratio - small**2, 1e-30))
        centred = bool((norm(one[None])[0].float() - bias).abs().max() < 1e-3 * full.abs().max())
        gain = full / spread.to(full.device) * (1 + eps) ** 0.5
        return cls(gain.to(like.device), bias.to(like.device), centred, eps)

    def scale(self, residual: Tensor) -> Tensor:
        """1 / sigma of residuals [P, d]: float64 [P]."""
        x = residual.double()
        x = x - x.mean(1, keepdim=True) if self.centred else x
        return (x.square().mean(1) + self.eps).rsqrt()

    def lost(self, x: Tensor, part: Tensor) -> Tensor:
        """What a norm without centring puts out less where ``part`` is taken from ``x`` [n, d]: float32 [n, d]."""
        whole, rest = x.double(), x.double() - part.double()
        return ((whole * self.scale(whole)[:, None] - rest * self.scale(rest)[:, None]) * self.gain.double()).float()

    def slope(self, x: Tensor, part: Tensor) -> Tensor:
        """The same per unit of ``part``, where little of it is taken: d/dt of what is lost with t part, at t = 0."""
        x, part, scale = x.double(), part.double(), self.scale(x)[:, None]
        along = (x * part).mean(1, keepdim=True) * scale.square()
        return ((part - x * along) * scale * self.gain.double()).float()
