"""The curvature Q = log E_p[exp(m b)] - m E_p[b] of many (prompt, neuron) pairs: moments where a bound allows, directly
where not.

A moment E_p[b^k] is one matrix product for all pairs. With the moments up to order K, the last even one of order e,

    |remainder| <= sum_{k>K} |m|^k E_p|b|^k / k! <= m^e E_p[b^e] / e! * r^(K+1-e) e! / (K+1)! / (1 - r / (K+2)),

r = |m| max|b|. A neuron's order rises as long as another moment is expected to cost less than evaluating directly the
pairs that it saves; what then misses the tolerance is evaluated directly in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moescope.unembedding import Base, NotFiniteError, Picked, Softmax, Unembedding

#: Elements of one tile of powers, and of one direct evaluation: they stay in the cache.
_TILE, _DIRECT = 2**21, 2**19
#: The least number of tokens in a tile.
_LEAST = 256
#: Rounding of a float32 moment relative to itself: where one term is nearly all of the sum, each of the others is
#: rounded to half a unit of its last place (measured up to 2.0e-5). So products are ``DEPTH`` terms deep and summed in
#: float64; large products on the CPU may be deeper, because their kernels put a sum aside after as many terms.
DEPTH, _DEEPER, _LARGE = 512, 2048, 64
ROUNDING = DEPTH * 2**-24
#: Rounding of a direct evaluation in float32, whose sums are taken pairwise, relative to its result (measured below
#: 1e-7; times four), and of the steps it is made of, relative to them.
_PAIRWISE, _STEP = 4e-7, 2**-24
#: Rounding of a float32 element of W v, and of W v summed over a head, relative to the norms of both (measured up to
#: 2.2 and 1.2 times 2^-24 on a real model; about doubled). Where one element of v is nearly all of it, partial sums
#: stay as large as the whole: up to 31 times 2^-24, so that many times ``_DOMINANT`` its share are allowed for.
MISREAD, _MISREAD_SUM, _DOMINANT = 2**-22, 2.4 * 2**-24, 8
#: The highest order of the expansion.
MAX_ORDER = 9
#: A direct evaluation costs about as much as this many moments of one pair (measured: an exponential and seven passes
#: in float64 over the vocabulary against one multiply-add of a matrix product).
_DIRECT_COST = 200


class Projection:
    """Directions in logit space of the values [n, d] of some neurons: b = W v up to a constant.

    Held as ``u`` = b / size [n, V] float32, size = |v| times the longest row of W: |u| <= 1 whatever the values, so
    that its powers do not overflow. From centred rows: a constant added to all logits changes nothing, and a smaller b
    means fewer moments. ``unit`` [n, d] float64 is what W is multiplied with, ``largest`` [n] = max |u|, ``misread``
    [n] how far u may be off. ``space`` [>= n, V]: memory for ``u`` (memory that is new to a process is slow).
    """

    def __init__(self, unembedding: Unembedding, values: Tensor, space: Tensor | None = None):
        self.unembedding = unembedding
        values, widest = values.double(), unembedding.widest
        norm = values.norm(dim=1)
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        self.size = norm * widest
        self.unit = values / self.size[:, None]
        self.dominance = (_DOMINANT * values.abs().amax(1) / norm).clamp_min(1).float()
        self.misread = MISREAD * self.dominance
        unit = self.unit.float()
        self.u = unit.new_empty(len(values), len(unembedding.weight)) if space is None else space[: len(values)]
        largest = []
        for tile in _tiles(*self.u.shape):
            part = torch.mm(unit, unembedding.centred[tile].T, out=self.u[:, tile])
            largest.append(torch.maximum(part.amax(1), -part.amin(1)))
        self.largest = torch.stack(largest).amax(0).double()

    def expected(self, base: Base) -> Tensor:
        """E_p[u] of the prompts of a base: float64 [P, n]."""
        return (base.mean - self.unembedding.centre) @ self.unit.T

    def steps(self, coefficients: Tensor, base: Base) -> tuple[Tensor, Tensor]:
        """w = s c size, so that m b = w u, and w E_p[u]: float64 [P, n].

        Raises NotFiniteError where one is not finite.
        """
        w = coefficients.double() * base.scale[:, None] * self.size
        expected = w * self.expected(base)
        if not (expected.isfinite().all() and w.isfinite().all()):
            raise NotFiniteError("coefficients, values, residuals or norm scales are not finite: check the weights")
        return w, expected


class Series:
    """log E_p[exp(w u)] - w E_p[u] of all pairs [P, n] of a projection, to an absolute tolerance (nats).

    ``curvature`` [P, n] float64; ``bound`` [P, n] float32 of its error, 0 where evaluated directly (``direct`` [P, n]);
    ``orders`` [n] of the neurons; ``flops`` of the float32 matrix products.
    """

    def __init__(self, projection: Projection, w: Tensor, expected: Tensor, base: Base, tolerance: float):
        self.projection, self.base, self.tolerance = projection, base, tolerance
        self.w, self.expected = w, expected
        self.r = (w.abs() * projection.largest).float()
        # E_p[exp(m b)] >= exp(m E_p[b]) (Jensen): dividing by it turns an error of the first into one of its logarithm
        self.shrink = (-expected.float()).exp()
        self.orders = torch.full_like(projection.largest, 2, dtype=torch.long)
        self.flops = 2 * projection.u.numel() * projection.unit.shape[1]
        term = 0.5 * w.square() * self._moment(None, 2)
        self.excess = expected + term  # E_p[exp(m b)] - 1 as far as the order goes
        self.even = term.float()
        self.remainder = remainder(self.even, self.r, self.shrink, 2)
        self.misread = projection.misread * self.w.abs().float() * base.width[:, None]
        self.spread, self.rounding = rounding(self.even, self.misread, self.r, self.shrink)
        # underflow loses powers of u below 1e-38, which w^k must not make matter
        self.rounding[self.w.abs() > 1e4] = torch.inf
        self._extend(0.5 * w.square())
        self.bound = self.remainder + self.rounding
        self.direct = ~(self.bound <= tolerance)  # written so that NaN counts as failed
        self.bound[self.direct] = 0
        self.curvature = torch.log1p(self.excess.clamp_min_(-1 + 1e-12)) - expected
        self.left = self._evaluate()

    def _moment(self, neurons: Tensor | None, k: int) -> Tensor:
        """E_p[u^k] of some neurons, or of all: float64 [P, neurons]."""
        u, prob = self.projection.u, self.base.prob
        chosen = len(u) if neurons is None else len(neurons)
        large = u.device.type == "cpu" and min(chosen, len(prob)) >= _LARGE
        total = torch.zeros(len(prob), chosen, dtype=torch.float64, device=u.device)
        buffers = u.new_empty(2, chosen, _DEEPER if large else DEPTH)  # memory that is new to a process is slow
        for tile in _tiles(1, u.shape[1], buffers.shape[2]):
            x = u[:, tile]
            taken, power = (buffer[:, : x.shape[1]] for buffer in buffers)
            if neurons is not None:
                x = torch.index_select(x, 0, neurons, out=taken)
            torch.mul(x, x, out=power)
            for _ in range(k - 2):
                power.mul_(x)
            total += prob[:, tile] @ power.T
        self.flops += 2 * prob.shape[1] * total.numel()
        return total

    def _extend(self, factor: Tensor) -> None:
        """Raise the order of those neurons for which that pays, one moment at a time; ``factor`` = w^2 / 2."""
        neurons = torch.arange(self.w.shape[1], device=self.w.device)
        for order in range(3, MAX_ORDER + 1):
            known = (x[:, neurons] for x in (self.remainder, self.r, self.rounding))
            pays = worthwhile(*known, self.tolerance, order, lambda _: 1, _DIRECT_COST)
            if not pays.any():
                return
            neurons = neurons[pays]
            factor = factor[:, pays] * self.w[:, neurons] / order  # w^k / k!
            term = factor * self._moment(neurons, order)
            self.excess[:, neurons] += term
            self.orders[neurons] = order
            if order % 2 == 0:
                self.even = self.even.index_copy(1, neurons, term.float())
            known = (x[:, neurons] for x in (self.even, self.r, self.shrink))
            self.remainder[:, neurons] = remainder(*known, order)

    def _evaluate(self) -> Left:
        """Evaluate the pairs that the series does not reach, but for those which need more than float32 input."""
        spread = self.spread.clamp_max(2)
        off = self.misread * spread + _PAIRWISE * spread.square().clamp_max(1) + _STEP * (2 + 3 * self.r) * spread
        exact = self.direct & ~((off <= self.tolerance) & (self.r < 4))
        for chunk in (self.direct & ~exact).nonzero().split(max(1, _DIRECT // self.projection.u.shape[1])):
            prompt, neuron = chunk.T
            x = self.projection.u[neuron].mul_(self.w[prompt, neuron, None].float())
            x -= self.expected[prompt, neuron, None].float()
            self.curvature[prompt, neuron] = _excess(x, self.base.prob[prompt]).double().log1p()
        prompt, neuron = exact.nonzero().T
        neurons, place = neuron.unique(return_inverse=True)
        return Left(self.projection.unit[neurons], place, self.w[prompt, neuron], prompt, neuron, prompt)


def remainder(even: Tensor, r: Tensor, shrink: Tensor, order: int) -> Tensor:
    """Bound on what a series of steps of at most ``r`` leaves out of the logarithm, from its last even term."""
    gap = r * r / (order * (order + 1)) if order % 2 else r / (order + 1)
    return even * gap / (1 - r / (order + 2)).clamp_min(0) * shrink


def rounding(second: Tensor, misread: Tensor, r: Tensor, shrink: Tensor) -> tuple[Tensor, Tensor]:
    """What float32 rounds, from the second-order term and how far steps of at most ``r`` may be off: (the root mean
    square of exp(x) - 1 at most, the error of the logarithm at most). The steps enter through (m b) (m delta b), and by
    themselves where float32 lost them."""
    growth = (torch.expm1(r) / r.clamp_min(1e-30)).clamp_min(1) * shrink
    spread = ((2 * second).sqrt() + misread) * growth
    return spread, ROUNDING * second * growth + misread * spread


def worthwhile(
    error: Tensor, r: Tensor, rounded: Tensor, tolerance: float, order: int, moments: Callable[[int], int], direct: int
) -> Tensor:
    """For which neurons [n] of pairs [P, n] moments from ``order`` on cost less than the direct evaluations that they
    save; costs per pair: ``moments`` of an order, and a ``direct`` evaluation."""
    room, cost = tolerance - rounded, 0
    best = now = (~(error <= room)).sum(0) * direct
    for k in range(order, MAX_ORDER + 1):
        error, cost = error * r / (k + 1), cost + moments(k) * len(r)  # at most, since no step exceeds r
        best = torch.minimum(best, (~(error <= room)).sum(0) * direct + cost)
    return best < now


@dataclass
class Left:
    """Pairs that need float64 throughout, each a step w u along one of the directions ``unit`` [k, d] (``place``, w
    [q]) or along a mixture of all of them (place None, w [q, k]); ``row`` and ``column`` of their scores and their
    ``prompt``, [q]."""

    unit: Tensor
    place: Tensor | None
    w: Tensor
    row: Tensor
    column: Tensor
    prompt: Tensor

    def steps(self, u: Tensor, pairs: slice) -> Tensor:
        """The steps of some pairs over a tile of the vocabulary, from u [k, tile]."""
        if self.place is None:
            return self.w[pairs] @ u
        return u[self.place[pairs]].mul_(self.w[pairs, None])


def exact(unembedding: Unembedding, base: Base, several: Sequence[Left]) -> list[Tensor]:
    """LPI of pairs by the definition, everything in float64, in one pass over the unembedding: [q] for each of
    several."""
    several = [left for left in several if len(left.row)]
    if not several:
        return []
    prompts, rows = torch.cat([left.prompt for left in several]).unique(return_inverse=True)
    places = rows.split([len(left.row) for left in several])
    totals = [Softmax(len(left.row), prompts.device) for left in several]
    targets = [Picked(base.target[left.prompt]) for left in several]
    for tile, z, weight in unembedding.tiles(base.residual[prompts], base.scale[prompts]):
        for left, place, total, target in zip(several, places, totals, targets, strict=True):
            u = left.unit @ weight.T
            step = max(1, _DIRECT // u.shape[1])
            for pairs in (slice(first, first + step) for first in range(0, len(place), step)):
                moved = left.steps(u, pairs).add_(z[place[pairs]])
                target.add(moved, tile, pairs)
                total.add(moved, pairs)
    return [
        target.logit - total.log_total() - base.of_target[left.prompt]
        for left, total, target in zip(several, totals, targets, strict=True)
    ]


def of_sums(
    projection: Projection, w: Tensor, expected: Tensor, base: Base, width: int, tolerance: float
) -> tuple[Tensor, float, list[Left]]:
    """The curvature of the sums over every ``width`` neurons of a projection (heads), [P, n / width] float64, the
    largest bound of their errors, and what is left to be formed in float64."""
    found, worst, left = [], 0.0, []
    for number, head in enumerate(torch.arange(w.shape[1], device=w.device).split(width)):
        steps, mean = w[:, head].float(), expected[:, head].sum(1)
        excess, largest = torch.zeros_like(mean), torch.zeros_like(mean)
        for tile in _tiles(8 * len(w), projection.u.shape[1]):
            x = (steps @ projection.u[head, tile]).sub_(mean.float()[:, None])
            largest = torch.maximum(largest, x.amax(1))
            excess += _excess(x, base.prob[:, tile])
        spread = (2 * excess).sqrt()
        misread = _MISREAD_SUM * base.width * (steps * projection.dominance[head]).norm(dim=1) + 2 * _STEP * mean.abs()
        off = misread * (spread + misread).clamp_max(2) + _PAIRWISE * excess.clamp_max(1)
        off += 2 * _STEP * spread.clamp_max(1)
        lost = ~((off <= tolerance) & (largest < 4))
        some = lost.nonzero()[:, 0]
        found.append(torch.log1p(excess))
        worst = max(worst, float(off.masked_fill(lost, 0).amax()) if len(off) else 0.0)
        # a direction a pair, or all directions of the head, whichever are fewer
        mixed, unit, place = w[some][:, head], projection.unit[head], None
        if len(some) < width:
            mixed, unit, place = torch.ones_like(mean[some]), mixed @ unit, torch.arange(len(some), device=w.device)
        left.append(Left(unit, place, mixed, some, torch.full_like(some, number), some))
    return torch.stack(found, 1), worst, left


def _excess(x: Tensor, prob: Tensor) -> Tensor:
    """E_p[exp(x)] - 1 of steps x [k, V] float32 in logit space around their mean, over some tokens: [k].

    Around the mean, exp(x) - 1 - x is second order and never negative: what x and p are rounded by enters at second
    order too; but exp(x) - 1 itself is off by 2^-24 x, at first order. Overwrites ``x``.
    """
    return torch.expm1(x).sub_(x).mul_(prob).sum(1)


def _tiles(rows: int, columns: int, most: int | None = None) -> list[slice]:
    """Slices of the columns of a matrix that stay in the cache, or of at most so many columns."""
    step = most or max(_LEAST, _TILE // max(1, rows))
    return [slice(start, min(start + step, columns)) for start in range(0, columns, step)]
