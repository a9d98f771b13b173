"""LPI where the final norm is measured anew (``local``): for the residual r, and again for r with the vector added.

With sigma the norm's statistic, a = W r / sigma(r) the base logits without offset, b = W v,
s = sigma(r) / sigma(r + c v) and m = s c / sigma(r), a vector moves the logits by X = (s - 1) a + m b: it also changes
their temperature.

    LPI = X_t - log E_p[exp(X)] = g.((s - 1) r / sigma(r) + m v) - Q,    g = W_t - E_p[W].

Q, the curvature, is expanded in cross moments E_p[a^i b^j], i + j >= 2, a around its mean: products of p a^i and b^j,
shared by all prompts and neurons. With ||.||_e = E_p[|.|^e]^(1/e) and e the last even order up to K,

    |remainder| <= (|s - 1| ||a||_e + |m| ||b||_e)^e / e! * r^(K+1-e) e! / (K+1)! / (1 - r / (K+2)),

r = |s - 1| max|a| + |m| max|b| (Minkowski's inequality: no term of that bound cancels another). Pairs that miss the
tolerance are evaluated by the definition in float64; with soft-capped logits every pair is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moescope import lpi, moments
from moescope.unembedding import Base, NotFiniteError, Softmax, Unembedding, target_log_prob

#: Elements of [neurons, V] that are held at once, and of one direct evaluation.
_PROJECTED, _DIRECT = 2**26, 2**19
#: How many cross moments cost as much as one pair by the definition (measured between 130 and 300).
_DIRECT_COST = 200
#: Where sigma falls below this share of itself, r and c v almost cancel: only their sum tells what is left.
_CANCELS = 1 / 30


class Norm(Protocol):
    """What has to be known of the final norm (``norms.Norm``)."""

    centred: bool

    def scale(self, residual: Tensor) -> Tensor:
        """1 / sigma of residuals [P, d]: float64 [P]."""


def of_neurons(
    unembedding: Unembedding,
    norm: Norm,
    base: Base,
    parts: Sequence[lpi.Neurons],
    certificate: lpi.Certificate | None = None,
) -> list[Tensor]:
    """LPI of every (prompt, neuron) pair of a site, to the guarantee of ``lpi.of_neurons``: [p, n] float64 (nats) for
    each of its parts. ``base`` is read with the norm's scale of its own residual.

    Raises NotFiniteError on input or output that is not finite, ValueError where the base was read with another scale.
    """
    reading = _Reading(unembedding, norm, base)
    certificate = certificate or lpi.Certificate()
    first = [_Moves(reading.of(part.rows), part).first for part in parts]
    actual, tolerance = lpi.tolerance_of(first, parts), math.inf
    while tolerance > actual:  # what is known only with the scores is guessed; half of it leaves room for the guess
        tolerance = max(1e-9, 0.5 * actual)
        found = [_score(reading.of(part.rows), part, tolerance) for part in parts]
        actual = lpi.tolerance_of([scored.lpi for scored in found], parts)
    for scored in found:
        certificate.add(lpi.finite(scored), tolerance)
    return [scored.lpi for scored in found]


def of_heads(
    unembedding: Unembedding,
    norm: Norm,
    base: Base,
    neurons: lpi.Neurons,
    heads: int,
    certificate: lpi.Certificate | None = None,
) -> tuple[Tensor, Tensor]:
    """LPI of the neurons of an attention site [P, n], and of its heads [P, heads], each the vector that its own
    n / heads consecutive neurons write together: float64, nats."""
    if heads < 1 or len(neurons.values) % heads:
        raise ValueError(f"{len(neurons.values)} neurons are not those of {heads} heads")
    (scores,) = of_neurons(unembedding, norm, base, [neurons], certificate)
    own = torch.arange(scores.shape[1], device=scores.device).chunk(heads)
    writes = (neurons.coefficients[:, h].double() @ neurons.values[h].double() for h in own)
    return scores, torch.stack([of_vectors(unembedding, norm, base, write) for write in writes], 1)


def of_vectors(unembedding: Unembedding, norm: Norm, base: Base, writes: Tensor) -> Tensor:
    """LPI of one vector a prompt [P, d]: float64 [P], nats; by the definition in float64."""
    after = base.residual.double() + writes.double()
    return target_log_prob(unembedding, after, norm.scale(after), base.target) - base.of_target


class _Reading:
    """What is read from the base residuals, and how: ``a`` [P, V] float32 the logits without offset around their mean
    under p, as shares of the largest, ``largest`` [P] float64; None where logits are soft-capped."""

    def __init__(self, unembedding: Unembedding, norm: Norm, base: Base):
        if not torch.allclose(base.scale, norm.scale(base.residual), rtol=1e-6, atol=0):
            raise ValueError("norm `local` needs a base that is read with the scale of its own residual")
        self.unembedding, self.norm, self.base = unembedding, norm, base
        self.a = self.largest = None
        if unembedding.cap is not None:
            return
        mean = base.scale * (base.residual.double() * base.mean).sum(1)
        self.a = torch.empty_like(base.prob)
        for tile, z, _ in unembedding.tiles(base.residual, base.scale):
            self.a[:, tile] = z.sub_(unembedding.offset[tile]).sub_(mean[:, None])
        largest = torch.maximum(self.a.amax(1), -self.a.amin(1))
        largest[largest == 0] = 1
        self.a /= largest[:, None]
        self.largest = largest.double()

    def of(self, rows: Tensor | None) -> _Reading:
        """The same for some of the prompts (all: None)."""
        if rows is None:
            return self
        some = copy.copy(self)
        some.base = self.base.rows(rows)
        if self.a is not None:
            some.a, some.largest = self.a[rows], self.largest[rows]
        return some


class _Moves:
    """How the vectors of neurons move the logits: by ``change`` a + ``m`` W v, change = s - 1, [p, n] float64.

    ``first`` [p, n]: what the target's logit gains over the mean logit; ``cancels`` [p, n]: where r and c v almost
    cancel, and s has lost its digits.
    """

    def __init__(self, reading: _Reading, neurons: lpi.Neurons):
        base, c, v = reading.base, neurons.coefficients.double(), neurons.values.double()
        r = base.residual.double()
        of_r, of_v = base.scale * (r * base.gradient).sum(1), base.gradient @ v.T
        if reading.norm.centred:
            r, v = r - r.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
        # sigma(r + c v)^2 = (1 + x) sigma(r)^2; s - 1 is formed from x, so that it keeps its digits where x is small
        x = c * (2 * r @ v.T + c * v.square().sum(1)) * (base.scale.square() / r.shape[1])[:, None]
        root = (1 + x).clamp_min(1e-30).sqrt()
        self.cancels = root < _CANCELS
        self.change = -x / (root * (1 + root))
        self.m = base.scale[:, None] * c / root
        self.first = self.change * of_r[:, None] + self.m * of_v
        if not self.first.isfinite().all():
            raise NotFiniteError("coefficients, values or residuals are not finite: check the weights")


def _score(reading: _Reading, part: lpi.Neurons, tolerance: float) -> lpi.Scored:
    moves, scored = _Moves(reading, part), lpi.Scored.empty(part)
    scored.lpi[:] = moves.first
    direct = torch.ones_like(scored.lpi, dtype=torch.bool)
    if reading.a is not None:
        step = max(1, _PROJECTED // reading.a.shape[1])
        for start in range(0, len(part.values), step):
            some = slice(start, start + step)
            series = _Series(reading, part.values[some], moves, some, tolerance)
            scored.lpi[:, some] -= series.curvature
            direct[:, some] = series.direct
            scored.served(series.orders, series.direct, series.bound)
            scored.flops += series.flops
    scored.direct = int(direct.sum())
    for pairs, evaluated in ((direct & moves.cancels, _by_sum), (direct & ~moves.cancels, _by_steps)):
        if pairs.any():
            scored.lpi[pairs] = evaluated(reading, part, moves, *pairs.nonzero().T)
    return scored


class _Series:
    """log E_p[exp(X)] - E_p[X] of all pairs [p, n] of some neurons to an absolute tolerance (nats): ``curvature``
    float64, the ``bound`` of its error, which pairs miss it (``direct``), the ``orders`` [n] of the neurons."""

    def __init__(self, reading: _Reading, values: Tensor, moves: _Moves, some: slice, tolerance: float):
        projection, base = moments.Projection(reading.unembedding, values), reading.base
        self.prob, self.a, self.u = base.prob, reading.a, projection.u
        self.flops = 2 * self.u.numel() * values.shape[1]
        # X = t a + w u, with both a and u between -1 and 1: their powers do not overflow
        self.t, self.w = moves.change[:, some] * reading.largest[:, None], moves.m[:, some] * projection.size
        mean = self.w * projection.expected(base)
        # E_p[exp(X)] >= exp(E_p[X]) (Jensen): dividing by it turns an error of the first into one of its logarithm
        self.shrink = (-mean).exp()
        self.r = self.t.abs() + self.w.abs() * projection.largest
        self.excess = mean.clone()  # E_p[exp(X)] - 1 as far as the order goes
        self.even, self.remainder = torch.empty_like(mean), torch.empty_like(mean)
        self.orders = torch.full_like(projection.largest, 2, dtype=torch.long)
        neurons = torch.arange(len(values), device=mean.device)
        self._extend(neurons, 2)
        misread = projection.misread * self.w.abs() * base.width[:, None]
        _, self.rounding = moments.rounding(self.even, misread, self.r, self.shrink)
        # steps whose powers make matter what underflows in those of a and u
        self.rounding[(self.t.abs() > 1e4) | (self.w.abs() > 1e4) | moves.cancels[:, some]] = torch.inf
        for order in range(3, moments.MAX_ORDER + 1):
            known = (x[:, neurons] for x in (self.remainder, self.r, self.rounding))
            # an order k has k cross moments
            neurons = neurons[moments.worthwhile(*known, tolerance, order, lambda k: k, _DIRECT_COST)]
            if not len(neurons):
                break
            self._extend(neurons, order)
        self.bound = self.remainder + self.rounding
        self.direct = ~(self.bound <= tolerance)  # written so that NaN counts as failed
        self.curvature = torch.log1p(self.excess.clamp_min(-1 + 1e-12)) - mean

    def _extend(self, neurons: Tensor, k: int) -> None:
        """Add the terms of order k for some neurons, and bound what then remains."""
        cross, own = self._moments(neurons, k)
        t, w, r = self.t[:, neurons], self.w[:, neurons], self.r[:, neurons]
        term = t**k * own[:, None]
        for i, moment in enumerate(cross):
            term += math.comb(k, i) * t**i * w ** (k - i) * moment
        self.excess[:, neurons] += term / math.factorial(k)
        self.orders[neurons] = k
        if k % 2 == 0:
            norm = t.abs() * own[:, None] ** (1 / k) + w.abs() * cross[0] ** (1 / k)
            self.even[:, neurons] = norm**k / math.factorial(k)
        self.remainder[:, neurons] = moments.remainder(self.even[:, neurons], r, self.shrink[:, neurons], k)

    def _moments(self, neurons: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """E_p[a^i u^(k-i)] of some neurons for i = 0 .. k - 1, [k, p, neurons] float64, and E_p[a^k], [p] float64."""
        tokens, own = self.prob.shape[1], self.t.new_zeros(len(self.t))
        cross = self.t.new_zeros(k, len(self.t), len(neurons))
        for start in range(0, tokens, moments.DEPTH):
            tile = slice(start, start + moments.DEPTH)
            weight, powers = self.prob[:, tile], [self.u[neurons, tile]]
            for _ in range(k - 1):
                powers.append(powers[-1] * powers[0])
            for moment, power in zip(cross, reversed(powers), strict=True):
                moment += weight @ power.T
                weight = weight * self.a[:, tile]
            own += weight.sum(1)
        self.flops += 2 * tokens * cross.numel()
        return cross, own


def _by_steps(reading: _Reading, part: lpi.Neurons, moves: _Moves, prompt: Tensor, neuron: Tensor) -> Tensor:
    """LPI of some pairs by the definition, everything in float64: [pairs]."""
    unembedding, base = reading.unembedding, reading.base
    prompts, row = prompt.unique(return_inverse=True)
    neurons, place = neuron.unique(return_inverse=True)
    residual, scale, values = base.residual[prompts], base.scale[prompts], part.values[neurons].double()
    s, m = 1 + moves.change[prompt, neuron, None], moves.m[prompt, neuron, None]
    softmax = Softmax(len(prompt), prompt.device)
    for tile, z, rows in unembedding.tiles(residual, scale, capped=False):
        offset = unembedding.offset[tile]
        a, b = z.sub_(offset), values @ rows.T
        pairs_at_once = max(1, _DIRECT // len(rows))
        for first in range(0, len(prompt), pairs_at_once):
            pairs = slice(first, first + pairs_at_once)
            moved = a[row[pairs]].mul_(s[pairs]).addcmul_(b[place[pairs]], m[pairs]).add_(offset)
            softmax.add(unembedding.capped(moved), pairs)
    own, offset = unembedding.weight[base.target[prompts]].double(), unembedding.offset[base.target[prompt]]
    a, b = scale * (own * residual.double()).sum(1), own @ values.T
    of_target = unembedding.capped(offset + s[:, 0] * a[row] + m[:, 0] * b[row, place])
    return of_target - softmax.log_total() - base.of_target[prompt]


def _by_sum(reading: _Reading, part: lpi.Neurons, moves: _Moves, prompt: Tensor, neuron: Tensor) -> Tensor:
    """The same from r + c v itself, whatever is left of it, at the price of a product with all of W for each pair."""
    found = []
    for p, n in zip(*(x.split(max(1, _DIRECT // part.values.shape[1])) for x in (prompt, neuron)), strict=True):
        after = reading.base.residual[p].double() + part.coefficients[p, n, None].double() * part.values[n].double()
        target, before = reading.base.target[p], reading.base.of_target[p]
        found.append(target_log_prob(reading.unembedding, after, reading.norm.scale(after), target) - before)
    return torch.cat(found)
