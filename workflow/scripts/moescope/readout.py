"""Reading the target's log-probability from a residual, as the model itself reads it from the last one.

The final norm is measured, not looked up, and frozen at every prompt's last residual; the affine map that results must
give the model's own logits, or nothing is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from moescope import local_norm, lpi
from moescope.decomposition import Decomposition, Trace
from moescope.errors import MoescopeError
from moescope.norms import Norm

#: Largest difference between the log-probabilities of the affine map and the model's own (nats, over the vocabulary).
TOLERANCE = 1e-3


class ReadoutError(MoescopeError):
    """The model's logits are no affine map of its last residual behind the norm."""


@dataclass
class Readout:
    """The unembedding and the final norm, the target of every prompt, and the norm scale [P] that its last residual
    has.

    ``local``: every residual is read with the scale that it has itself, else (the definition of LPI) all with that of
    the prompt's last one.
    """

    unembedding: lpi.Unembedding
    norm: Norm
    scale: Tensor
    target: Tensor
    local: bool = False

    @classmethod
    def of(cls, decomposition: Decomposition, trace: Trace, target: Tensor, local: bool = False) -> Readout:
        """Raises ReadoutError where the affine read-out does not give the model's own logits."""
        norm, head = Norm.of(decomposition.norm, trace.final[0]), decomposition.head
        few = slice(0, 64)
        own, scale = trace.logits[few].double(), norm.scale(trace.final)
        plain = lpi.Unembedding.of(
            head.weight.detach(), norm.gain, norm.centred, norm.bias, getattr(head, "bias", None)
        )
        affine = plain.logits(trace.final[few], scale[few])
        for factor, cap in _head_forms(decomposition.model.config.get_text_config(), affine, own):
            read = replace(plain, cap=cap).capped(factor * affine)
            error = (read.log_softmax(-1) - own.log_softmax(-1)).abs().max().item()
            if error <= TOLERANCE:
                weight, offset = plain.weight.mul_(factor), plain.offset * factor
                return cls(lpi.Unembedding(weight, offset, cap), norm, scale, target, local)
        name = type(decomposition.model).__name__
        raise ReadoutError(
            f"{name}: logits are not an affine map of the normed residual (off by {error:.1e} nats), "
            "soft-capped or not; not supported"
        )

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


def _head_forms(config: object, affine: Tensor, own: Tensor) -> Iterator[tuple[float, float | None]]:
    """What a model may do with the logits of its head: (factor, soft cap). The first that makes its ``own`` logits of
    the ``affine`` ones [P, V] is the one.

    The figures of the configuration stand first, because they are exact; families name the factor differently and
    divide by it or multiply, so it is measured where none of them fits.
    """
    factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    yield from dict.fromkeys([(factor, cap), (factor, None), (1.0, cap), (1.0, None)])
    yield from ((_slope(affine, own, c), c) for c in dict.fromkeys([cap, None]))


def _slope(affine: Tensor, own: Tensor, cap: float | None) -> float:
    """The factor between logits and a model's own, by least squares."""
    if cap is not None:
        clear = own.abs() < 0.9 * cap  # nearer to the cap, undoing it magnifies what float32 rounded
        affine, own = affine[clear], cap * (own[clear] / cap).atanh()
    return ((affine * own).sum() / affine.square().sum()).item()
