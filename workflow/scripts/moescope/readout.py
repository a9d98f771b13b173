"""Reading the target's log-probability from a residual, as the model itself reads it from the last one.

The final norm is measured, not looked up, and frozen at every prompt's last residual; the affine map that results must
give the model's own logits, or nothing is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moescope import local_norm, lpi
from moescope.decomposition import Decomposition, Trace
from moescope.errors import MoescopeError

#: Largest difference between the log-probabilities of the affine map and the model's own (nats, over the vocabulary).
TOLERANCE = 1e-3


class ReadoutError(MoescopeError):
    """The model's logits are no affine map of its last residual behind the norm."""


@dataclass(frozen=True)
class FinalNorm:
    """The final norm as x -> gain * (x - mean(x) if centred) / sigma(x) + bias, sigma = sqrt(mean square + eps).

    ``gain`` and ``bias`` [d] float32. Measured from the module's outputs on probes, so that neither the name of its
    weight nor of its eps matters, nor whether the gain is w or 1 + w.
    """

    gain: Tensor
    bias: Tensor
    centred: bool
    eps: float

    @classmethod
    @torch.no_grad()
    def of(cls, norm: nn.Module, like: Tensor) -> FinalNorm:
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
        return cls(full / spread * (1 + eps) ** 0.5, bias, centred, eps)

    def scale(self, residual: Tensor) -> Tensor:
        """1 / sigma of residuals [P, d]: float64 [P]."""
        x = residual.double()
        x = x - x.mean(1, keepdim=True) if self.centred else x
        return (x.square().mean(1) + self.eps).rsqrt()


@dataclass
class Readout:
    """The unembedding and the final norm, the target of every prompt, and the norm scale [P] that its last residual
    has.

    ``local``: every residual is read with the scale that it has itself, else (the definition of LPI) all with that of
    the prompt's last one.
    """

    unembedding: lpi.Unembedding
    norm: FinalNorm
    scale: Tensor
    target: Tensor
    local: bool = False

    @classmethod
    def of(cls, decomposition: Decomposition, trace: Trace, target: Tensor, local: bool = False) -> Readout:
        """Raises ReadoutError where the affine read-out does not give the model's own logits."""
        norm, head = FinalNorm.of(decomposition.norm, trace.final[0]), decomposition.head
        bias = getattr(head, "bias", None)
        unembedding = lpi.Unembedding.of(head.weight.detach(), norm.gain, norm.centred, norm.bias, bias)
        readout = cls(unembedding, norm, norm.scale(trace.final), target, local)
        few = slice(0, 64)
        mine = unembedding.log_probs(trace.final[few], readout.scale[few])
        error = (mine - trace.logits[few].double().log_softmax(-1)).abs().max().item()
        if not error <= TOLERANCE:
            name = type(decomposition.model).__name__
            raise ReadoutError(
                f"{name}: logits are not an affine map of the normed residual (off by {error:.1e} nats); not supported"
            )
        return readout

    def base(self, residual: Tensor, rows: Tensor | slice = slice(None)) -> lpi.Base:
        """The distribution read from residuals [P, d], of some of the prompts."""
        return lpi.Base.of(self.unembedding, residual[rows], self._scale(residual, rows), self.target[rows])

    def log_prob(self, residual: Tensor) -> Tensor:
        """log p(target) read from residuals [P, d]: float64 [P]."""
        return lpi.target_log_prob(self.unembedding, residual, self._scale(residual, slice(None)), self.target)

    def of_neurons(self, base: lpi.Base, parts: Sequence[lpi.Neurons], certificate: lpi.Certificate) -> list[Tensor]:
        """LPI of the neurons of a site, by ``lpi`` or ``local_norm``."""
        if self.local:
            return local_norm.of_neurons(self.unembedding, self.norm, base, parts, certificate)
        return lpi.of_neurons(self.unembedding, base, parts, certificate)

    def of_heads(
        self, base: lpi.Base, neurons: lpi.Neurons, heads: int, certificate: lpi.Certificate
    ) -> tuple[Tensor, Tensor]:
        """LPI of the neurons of an attention site and of its heads, by ``lpi`` or ``local_norm``."""
        if self.local:
            return local_norm.of_heads(self.unembedding, self.norm, base, neurons, heads, certificate)
        return lpi.of_heads(self.unembedding, base, neurons, heads, certificate)

    def _scale(self, residual: Tensor, rows: Tensor | slice) -> Tensor:
        return self.norm.scale(residual[rows]) if self.local else self.scale[rows]
