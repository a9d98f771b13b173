"""Log-probability increase (LPI): what adding a vector to a residual does to the target's log-probability.

With the final norm's statistic frozen at the prompt's last residual, logits are affine in the residual r,

    z = offset + s W r,    W = unembedding x diag(norm gain) (x centring for LayerNorm),    s = the prompt's norm scale,

so a vector c v added to r changes them by m b with b = W v, m = s c, and with p = softmax(z) and target t

    LPI = log p(t | r + c v) - log p(t | r) = m b_t - log E_p[exp(m b)] = m g.v - Q,
    g = W_t - E_p[W],    Q = log E_p[exp(m b)] - m E_p[b].

The first-order term needs one vector g per prompt and is formed in float64. Q, the curvature, is expanded in the
moments E_p[b^k], k >= 2: b does not depend on the prompt, so they are matrix products shared by all prompts and
neurons. With one even moment more than the odd order K the remainder is at most
|m|^(K+1) E_p[b^(K+1)] / (K+1)! * exp(|m| max|b|). Pairs whose bound misses the tolerance are evaluated directly in
float64. Nothing here knows models or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moescope.errors import MoescopeError

#: Vocabulary rows times neurons that are held at once; elements of one direct evaluation (they stay in the cache); and
#: elements of the unembedding that are held in float64.
_PROJECTED, _TILE, _DOUBLE = 2**25, 2**19, 2**25
#: Rounding of a float32 moment relative to the sum of absolute terms (measured below 1e-7; doubled).
_ROUNDING = 2e-7
#: The highest order of the expansion.
_MAX_ORDER = 13
#: A direct evaluation costs about as much as this many moments of one pair (measured: an exponential and five passes
#: over the vocabulary against one multiply-add of a matrix product).
_DIRECT_COST = 100


class NotFiniteError(MoescopeError, FloatingPointError):
    """A number that is NaN or infinite went in or came out: an error, never a silent score."""


@dataclass(frozen=True)
class Unembedding:
    """Logits as an affine map of the residual: ``weight`` [V, d] float32 with gain and centring folded in, ``offset``
    [V] float64, what the norm's and the head's bias add."""

    weight: Tensor
    offset: Tensor

    @cached_property
    def centre(self) -> Tensor:
        """The mean row, [d] float64."""
        return self.weight.mean(0, dtype=torch.float64)

    @classmethod
    def of(cls, head: Tensor, gain: Tensor, centred: bool, norm_bias: Tensor, head_bias: Tensor | None) -> Unembedding:
        """From head [V, d], norm gain [d], norm bias [d] and head bias [V]; ``centred`` for a LayerNorm."""
        head = head.float()
        offset = head.double() @ norm_bias.double() if norm_bias.any() else head.new_zeros(len(head)).double()
        weight = head * gain
        if centred:
            weight = weight - weight.mean(1, keepdim=True)
        return cls(weight, offset if head_bias is None else offset + head_bias.double())

    def log_probs(self, residual: Tensor, scale: Tensor) -> Tensor:
        """log softmax of the logits of residuals [P, d] with norm scales [P]: float64 [P, V].

        Float64, because float32 logits would leave a relative error of 1e-5 in every probability below.
        """
        x = (residual.double() * scale.double()[:, None]).T
        tiles = range(0, len(self.weight), _rows_at_once(self.weight))
        z = torch.cat([self.weight[v : v + tiles.step].double() @ x for v in tiles])
        return (z.T + self.offset).log_softmax(-1)


@dataclass(frozen=True)
class Base:
    """The distribution that vectors are added to, for P prompts: ``log_prob`` [P, V] float64, ``prob`` its exponential
    in float32, ``mean`` [P, d] float64 the expected row E_p[W], ``target`` [P] and the norm scales ``scale`` [P]."""

    log_prob: Tensor
    prob: Tensor
    mean: Tensor
    gradient: Tensor
    target: Tensor
    scale: Tensor

    @classmethod
    def of(cls, unembedding: Unembedding, log_prob: Tensor, target: Tensor, scale: Tensor) -> Base:
        """From log-probabilities [P, V], targets [P] and norm scales [P]."""
        prob, weight = log_prob.exp(), unembedding.weight
        tiles = range(0, len(weight), _rows_at_once(weight))
        mean = sum(prob[:, v : v + tiles.step] @ weight[v : v + tiles.step].double() for v in tiles)
        return cls(log_prob, prob.float(), mean, weight[target].double() - mean, target, scale.double())

    def rows(self, rows: Tensor) -> Base:
        """The same for some of the prompts."""
        return Base(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @property
    def of_target(self) -> Tensor:
        """log p(target): float64 [P]."""
        return self.log_prob.gather(1, self.target[:, None])[:, 0]


@dataclass
class Certificate:
    """How the numbers were reached: pairs scored, pairs evaluated directly, the largest bound of the others (nats),
    and how many blocks of neurons used each order."""

    pairs: int = 0
    direct: int = 0
    bound: float = 0.0
    orders: dict[int, int] | None = None

    def count(self, order: int, pairs: int, direct: int, bound: float) -> None:
        self.pairs, self.direct, self.bound = self.pairs + pairs, self.direct + direct, max(self.bound, bound)
        self.orders = self.orders or {}
        self.orders[order] = self.orders.get(order, 0) + 1

    def as_dict(self) -> dict:
        share = self.direct / self.pairs if self.pairs else 0.0
        orders = {str(k): v for k, v in sorted((self.orders or {}).items())}
        return {"pairs": self.pairs, "direct_share": share, "largest_bound": self.bound, "blocks_by_order": orders}


class Projection:
    """Directions in logit space of the values [n, d] of some neurons: b = W v up to a constant, float32 [n, V].

    Values are scaled to length one first (powers of b neither overflow nor vanish) and b is centred over the
    vocabulary (a constant added to all logits changes nothing, and a smaller b means fewer moments).
    """

    def __init__(self, unembedding: Unembedding, values: Tensor):
        self.weight = unembedding.weight
        norm = values.double().norm(dim=1)
        self.norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        self.unit = values.double() / self.norm[:, None]  # [n, d] float64
        self.centre = self.unit @ unembedding.centre
        self.b = self.unit.float() @ self.weight.T
        self.b -= self.centre.float()[:, None]
        self.largest = self.b.abs().amax(1).double()

    def exact(self, neurons: Tensor) -> Tensor:
        """b of some neurons in float64: [k, V]."""
        step = _rows_at_once(self.weight)
        tiles = [self.unit[neurons] @ self.weight[v : v + step].double().T for v in range(0, len(self.weight), step)]
        return torch.cat(tiles, 1) - self.centre[neurons, None]

    def steps(self, coefficients: Tensor, base: Base) -> tuple[Tensor, Tensor, Tensor]:
        """m = s c |v|, the first-order LPI m g.v and the expected step m E_p[b], all float64 [P, n].

        Raises NotFiniteError where one is not finite.
        """
        m = coefficients.double() * base.scale[:, None] * self.norm
        first = m * (base.gradient @ self.unit.T)
        expected = m * (base.mean @ self.unit.T - self.centre)
        if not (first.isfinite().all() and expected.isfinite().all() and (m.abs() * self.largest).isfinite().all()):
            raise NotFiniteError("coefficients, values, residuals or norm scales are not finite: check the weights")
        return m, first, expected


def neurons_at_once(unembedding: Unembedding) -> int:
    """How many neurons to project together so that memory stays bounded whatever the vocabulary."""
    return max(16, _PROJECTED // len(unembedding.weight))


def of_neurons(projection: Projection, coefficients: Tensor, base: Base, certificate: Certificate) -> Tensor:
    """LPI of every (prompt, neuron) pair: coefficients [P, n] -> float64 [P, n], nats.

    |error| <= tol (1 + |LPI|), tol = min(1e-6, max(1e-9, 1% of the block's median |LPI| of pairs with c != 0)).
    Raises NotFiniteError on input or output that is not finite.
    """
    m, first, expected = projection.steps(coefficients, base)
    expansion = _Expansion(projection, m, expected, base.prob)
    while True:
        lpi = first - expansion.curvature()
        remainder, rounding = expansion.errors()
        tolerance = _tolerance(lpi, coefficients) * (1 + lpi.abs())
        # written so that NaN counts as failed
        rounded = ~(rounding <= 0.5 * tolerance)
        cut = ~((remainder <= 0.5 * tolerance) & (expansion.excess > -0.5)) & ~rounded
        if not expansion.worthwhile(cut):
            break
        expansion.extend()
    exact, direct = torch.zeros_like(cut), torch.zeros_like(cut)
    while cut.any() or rounded.any():
        lpi[cut] = first[cut] - _curvature_of_pairs(projection.b, m, expected, base, cut)
        if rounded.any():  # float32 directions do not reach the tolerance here
            some = rounded.any(0).nonzero()[:, 0]
            lpi[rounded] = first[rounded] - _curvature_of_pairs(
                projection.exact(some), m[:, some], expected[:, some], base, rounded[:, some]
            )
        exact, direct = exact | rounded, direct | cut | rounded
        # the median held what was still unfinished: with all LPI known, the tolerance may be smaller
        tolerance = _tolerance(lpi, coefficients) * (1 + lpi.abs())
        rounded = ~(rounding <= 0.5 * tolerance) & ~exact
        cut = ~(remainder <= 0.5 * tolerance) & ~direct & ~rounded
    bound = (remainder + rounding)[~direct]
    certificate.count(expansion.order, direct.numel(), int(direct.sum()), float(bound.max()) if len(bound) else 0.0)
    return _finite(lpi)


def of_sums(projection: Projection, coefficients: Tensor, base: Base) -> Tensor:
    """LPI of sum_i c_i v_i, the whole vector at once (a head): coefficients [P, n] -> float64 [P], nats."""
    m, first, expected = projection.steps(coefficients, base)
    lpi = first.sum(1)
    for rows in torch.arange(len(m), device=m.device).split(max(1, 8 * _TILE // base.prob.shape[1])):
        steps = m[rows].float() @ projection.b
        lpi[rows] -= _curvature(steps, expected[rows].sum(1), base.prob[rows], base.log_prob[rows])
    return _finite(lpi)


def _finite(lpi: Tensor) -> Tensor:
    if not lpi.isfinite().all():
        raise NotFiniteError("LPI is not finite: a contribution is too large for float64; check the weights")
    return lpi


class _Expansion:
    """log E_p[exp(m b)] as a power series in m, two moments at a time; the order is odd.

    ``excess`` = E_p[exp(m b)] - 1 up to the order; with u = b / max|b| and r = m max|b| its terms are
    r^k E_p[u^k] / k!.
    """

    def __init__(self, projection: Projection, m: Tensor, expected: Tensor, prob: Tensor):
        largest = projection.largest
        self.u = projection.b / torch.where(largest > 0, largest, torch.ones_like(largest)).float()[:, None]
        self.r, self.prob = m * largest, prob
        self.growth = self.r.abs().clamp_max(700).exp()
        self.expected, self.excess = expected, expected.clone()
        self.order, self.power, self.term = 1, self.u.clone(), self.r
        self.absolute = torch.zeros_like(m)  # sum over k >= 2 of |r|^k E_p|u|^k / k!, at most
        self.previous, self.even = torch.ones_like(m), self._moment(2)
        # a float32 b is off by up to some 2^-22 of |w| |v| where rows share a direction (measured; else by a quarter of
        # that); it enters the curvature through (m b) (m delta b)
        wide = projection.weight.norm(dim=1).amax().double()
        self.projected = 2**-22 * wide * m.abs() * self.r.abs() * self.even.clamp_min(0).sqrt() * self.growth

    def _moment(self, k: int) -> Tensor:
        self.power *= self.u
        self.term = self.term * self.r / k
        return (self.prob @ self.power.T).double()

    def extend(self) -> None:
        """Raise the order by two: add the even term known so far and the next odd one, take the next even moment."""
        self.excess += self.term * self.even
        self.absolute += self.term.abs() * self.even
        odd = self._moment(self.order + 2)
        self.excess += self.term * odd
        odd_term = self.term.abs()
        self.previous, self.even = self.even, self._moment(self.order + 3)
        self.absolute += odd_term * (self.previous * self.even).clamp_min(0).sqrt()  # Cauchy-Schwarz: E|u|^k
        self.order += 2

    def curvature(self) -> Tensor:
        """Q = log E_p[exp(m b)] - m E_p[b], as far as the order goes."""
        return torch.log1p(self.excess.clamp_min(-0.5)) - self.expected

    def errors(self) -> tuple[Tensor, Tensor]:
        """Bounds on the error of Q: what the series leaves out, and what float32 rounds."""
        remainder = self.term.abs() * self.even * self.growth
        scale = (1 + self.excess - remainder).clamp_min(0.25)
        return remainder / scale, (_ROUNDING * (self.absolute + self.term.abs() * self.even) + self.projected) / scale

    def worthwhile(self, cut: Tensor) -> bool:
        """Whether two more moments of all pairs cost less than evaluating directly those that they could save."""
        hopeful = int((cut & (self.r.abs() < 4)).sum())
        return self.order < _MAX_ORDER and hopeful * _DIRECT_COST > 2 * cut.numel()


def _rows_at_once(weight: Tensor) -> int:
    """Rows of the unembedding to hold in float64 at a time."""
    return max(1, _DOUBLE // weight.shape[1])


def _tolerance(lpi: Tensor, coefficients: Tensor) -> Tensor:
    active = lpi[coefficients != 0].abs()
    median = active.median() if len(active) else lpi.new_zeros(())
    return (0.01 * median).clamp(1e-9, 1e-6)


def _curvature_of_pairs(b: Tensor, m: Tensor, expected: Tensor, base: Base, pairs: Tensor) -> Tensor:
    """Q of the chosen pairs [P, n] by the definition, from directions b [n, V] of either precision; in row order."""
    parts = []
    for chunk in pairs.nonzero().split(max(1, _TILE // b.shape[1])):
        prompt, neuron = chunk.T
        steps = b[neuron] * m[prompt, neuron, None].to(b.dtype)
        parts.append(_curvature(steps, expected[prompt, neuron], base.prob[prompt], base.log_prob[prompt]))
    return torch.cat(parts) if parts else m.new_empty(0)


def _curvature(steps: Tensor, expected: Tensor, prob: Tensor, log_prob: Tensor) -> Tensor:
    """Q = log E_p[exp(x - E_p[x])] of steps x [k, V] in logit space with E_p[x] [k] known in float64: float64 [k].

    Around its mean, exp(x) - 1 - x is never negative and second order throughout: nothing cancels, and neither the
    rounding of x nor that of its mean enters at first order. Overwrites ``steps``.
    """
    x = steps.sub_(expected[:, None].to(steps.dtype))
    far = (x.amax(1) > 30) if steps.dtype == torch.float32 else torch.ones_like(expected, dtype=torch.bool)
    out = torch.empty_like(expected)
    if far.any():
        out[far] = (log_prob[far] + x[far]).logsumexp(1)
    if not far.all():
        near = x[~far] if far.any() else x
        excess = torch.expm1(near).sub_(near).mul_(prob if len(near) == len(prob) else prob[~far])
        out[~far] = torch.log1p(excess.sum(1, dtype=torch.float64))
    return out
