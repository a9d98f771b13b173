"""Reading a residual: logits as an affine map of it, and the distribution over the vocabulary that they give.

With the final norm's statistic frozen at the prompt's last residual, logits are affine in the residual r,

    z = offset + s W r,    W = logit scale x unembedding x diag(norm gain) (x centring for LayerNorm),

s the prompt's norm scale; models with a soft cap read cap tanh(z / cap). Logits are formed in float64: float32 would
leave a relative error of 1e-5 in every probability.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moescope.errors import MoescopeError

#: Elements of the logits, or of the unembedding, that are held in float64 at a time.
_DOUBLE = 2**21


class NotFiniteError(MoescopeError, FloatingPointError):
    """A number that is NaN or infinite went in or came out: an error, never a silent score."""


@dataclass(frozen=True)
class Unembedding:
    """``weight`` [V, d] float32 with logit scale, gain and centring folded in; ``offset`` [V] float64, what the norm's
    and the head's bias add; ``cap`` of soft-capped logits, else None."""

    weight: Tensor
    offset: Tensor
    cap: float | None = None

    @classmethod
    def of(cls, head: Tensor, gain: Tensor, centred: bool, norm_bias: Tensor, head_bias: Tensor | None) -> Unembedding:
        """From head [V, d], norm gain [d], norm bias [d] and head bias [V]; ``centred`` for a LayerNorm."""
        weight = head.float() * gain
        if centred:
            weight -= weight.mean(1, keepdim=True)
        offset = torch.zeros(len(head), dtype=torch.float64, device=head.device)
        if norm_bias.any():
            rows = head.split(max(1, _DOUBLE // head.shape[1]))
            offset = torch.cat([part.double() @ norm_bias.double() for part in rows])
        return cls(weight, offset if head_bias is None else offset + head_bias.double())

    @cached_property
    def centre(self) -> Tensor:
        """The mean row, [d] float64; 0 where it is so short that nothing is gained by taking it out of the rows."""
        mean = self.weight.mean(0, dtype=torch.float64)
        return mean if mean.norm() > 2**-8 * self.weight.norm(dim=1).amax() else torch.zeros_like(mean)

    @cached_property
    def centred(self) -> Tensor:
        """The rows less their mean, [V, d] float32 (the weight itself where ``centre`` is 0). All logits less the same
        number are the same distribution; rows that share no direction make smaller steps and round less."""
        return self.weight - self.centre.float() if self.centre.any() else self.weight

    @cached_property
    def norms(self) -> Tensor:
        """The norms of the centred rows, [V] float32."""
        return self.centred.norm(dim=1)

    @cached_property
    def widest(self) -> Tensor:
        """The norm of the longest of them (1 where all are 0), float64."""
        widest = self.norms.amax().double()
        return torch.where(widest > 0, widest, 1)

    def logits(self, residual: Tensor, scale: Tensor) -> Tensor:
        """Logits of residuals [P, d] with norm scales [P]: float64 [P, V]."""
        return torch.cat([z.clone() for _, z, _ in self.tiles(residual, scale)], 1)

    def log_probs(self, residual: Tensor, scale: Tensor) -> Tensor:
        """log softmax of the logits of residuals [P, d] with norm scales [P]: float64 [P, V]."""
        return self.logits(residual, scale).log_softmax(-1)

    def capped(self, z: Tensor) -> Tensor:
        """Logits from their affine form, in place."""
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)

    def tiles(self, residual: Tensor, scale: Tensor, capped: bool = True) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The same in tiles of the vocabulary: (which tokens, their logits [P, k], their rows of the weight [k, d]), to
        be used before the next tile overwrites them. ``capped``: with the soft cap, where there is one."""
        x = residual.double() * scale.double()[:, None]
        buffer = None
        for tile, rows in self.in_double(len(x)):
            buffer = x.new_empty(x.shape[0] * len(rows)) if buffer is None else buffer
            z = torch.mm(x, rows.T, out=buffer[: x.shape[0] * len(rows)].view(-1, len(rows))).add_(self.offset[tile])
            yield tile, (self.capped(z) if capped else z), rows

    def in_double(self, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """The weight in float64, in tiles of the vocabulary whose products with so many columns stay small too: (which
        tokens, rows [k, d]), to be used before the next tile overwrites them."""
        tokens, d = self.weight.shape
        step = max(1, _DOUBLE // max(columns, d))
        buffer = torch.empty(min(step, tokens), d, dtype=torch.float64, device=self.weight.device)
        for start in range(0, tokens, step):
            part = self.weight[start : start + step]
            yield slice(start, start + len(part)), buffer[: len(part)].copy_(part)


@dataclass(frozen=True)
class Base:
    """The distribution that vectors are added to, for P prompts.

    ``residual`` [P, d], ``scale`` [P] and ``target`` [P] it was read from; ``prob`` [P, V] float32; ``mean`` [P, d]
    float64 the expected row E_p[W], ``gradient`` [P, d] float64 = W_t - E_p[W]; ``width`` [P] float32 the root mean
    square of the rows' norms, relative to the longest row; ``log_total`` [P] float64 the logits' log sum exp;
    ``of_target`` [P] float64 log p(target).
    """

    residual: Tensor
    scale: Tensor
    target: Tensor
    prob: Tensor
    mean: Tensor
    gradient: Tensor
    width: Tensor
    log_total: Tensor
    of_target: Tensor

    @classmethod
    def of(cls, unembedding: Unembedding, residual: Tensor, scale: Tensor, target: Tensor) -> Base:
        """Read residuals [P, d] with norm scales [P]. Raises NotFiniteError where one is not finite."""
        weight, scale = unembedding.weight, scale.double()
        prob = residual.new_empty(len(residual), len(weight), dtype=torch.float32)
        softmax, tops = Softmax(len(residual), residual.device), []
        mean, own = torch.zeros_like(residual, dtype=torch.float64), Picked(target)
        for tile, z, rows in unembedding.tiles(residual, scale):
            own.add(z, tile)
            shrink, e = softmax.add(z)
            mean.mul_(shrink[:, None]).addmm_(e, rows)
            prob[:, tile] = e
            tops.append((tile, softmax.top.clone()))
        log_total = softmax.log_total()
        for tile, top in tops:
            prob[:, tile] *= (top - log_total).exp().float()[:, None]
        mean /= softmax.total[:, None]
        of_target = _finite(own.logit - log_total, mean)
        gradient = weight[target].double() - mean
        width = (prob @ unembedding.norms.square()).sqrt() / unembedding.widest.float()
        return cls(residual, scale, target, prob, mean, gradient, width, log_total, of_target)

    def rows(self, rows: Tensor) -> Base:
        """The same for some of the prompts."""
        return Base(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def target_log_prob(unembedding: Unembedding, residual: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """log p(target) read from residuals [P, d] with norm scales [P]: float64 [P].

    Raises NotFiniteError where one is not finite.
    """
    softmax, own = Softmax(len(residual), residual.device), Picked(target)
    for tile, z, _ in unembedding.tiles(residual, scale):
        own.add(z, tile)
        softmax.add(z)
    return _finite(own.logit - softmax.log_total())


class Softmax:
    """log sum exp of rows of logits that come in tiles: the largest so far, and the sum of exp(z - largest)."""

    def __init__(self, rows: int, device: torch.device):
        self.top = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self.total = torch.zeros_like(self.top)

    def add(self, z: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Take in a tile [rows, k], overwriting it: (what sums so far are to be multiplied with, exp(z - largest))."""
        top = torch.maximum(self.top[rows], z.amax(1))
        shrink, e = (self.top[rows] - top).exp(), z.sub_(top[:, None]).exp_()
        self.total[rows] = self.total[rows] * shrink + e.sum(1)
        self.top[rows] = top
        return shrink, e

    def log_total(self) -> Tensor:
        return self.top + self.total.log()


class Picked:
    """The logit of one ``token`` [rows] of each row of logits that come in tiles. The very number that their log sum
    exp holds: where the token dominates, another product of the same vectors would differ by more than what is left."""

    def __init__(self, token: Tensor):
        self.token = token
        self.logit = torch.zeros(len(token), dtype=torch.float64, device=token.device)

    def add(self, z: Tensor, tile: slice, rows: slice = slice(None)) -> None:
        """Take in a tile [rows, k] of the vocabulary."""
        place = self.token[rows] - tile.start
        here = ((place >= 0) & (place < z.shape[1])).nonzero()[:, 0]
        self.logit[rows][here] = z[here, place[here]]


def _finite(*tensors: Tensor) -> Tensor:
    if not all(x.isfinite().all() for x in tensors):
        raise NotFiniteError(
            "logits are not finite: a residual, a norm scale or the unembedding is not; check the weights"
        )
    return tensors[0]
