"""Log-probability increase (LPI): what adding a vector to a residual does to the target's log-probability.

With logits affine in the residual (``unembedding``) a vector c v changes them by m b, b = W v and m = s c, and with
p = softmax(z) and target t

    LPI = log p(t | r + c v) - log p(t | r) = m b_t - log E_p[exp(m b)] = m g.v - Q,
    g = W_t - E_p[W],    Q = log E_p[exp(m b)] - m E_p[b].

The first-order term needs one vector g per prompt and is formed in float64. Q, the curvature, is expanded in the
moments E_p[b^k], k >= 2: b does not depend on the prompt, so they are matrix products shared by all prompts and
neurons (``moments``). Pairs whose bound misses the tolerance are evaluated directly. Soft-capped logits are not affine:
there every pair is. Nothing here knows models or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moescope import moments
from moescope.moments import Projection, Series
from moescope.unembedding import Base, NotFiniteError, Picked, Softmax, Unembedding, target_log_prob

__all__ = [
    "Base",
    "Certificate",
    "Neurons",
    "NotFiniteError",
    "Scored",
    "Unembedding",
    "of_heads",
    "of_neurons",
    "of_vectors",
    "target_log_prob",
]

#: Vocabulary rows times neurons that are held at once.
_PROJECTED = 2**26


@dataclass(frozen=True)
class Neurons:
    """Neurons that write to the same residual in the same prompts: ``values`` [n, d] of any dtype, ``coefficients``
    [p, n], and the prompts they are active in, ``rows`` [p] (all: None)."""

    values: Tensor
    coefficients: Tensor
    rows: Tensor | None = None


@dataclass
class Certificate:
    """How the numbers were reached: pairs scored, pairs evaluated directly, the largest bound of the others relative to
    its tolerance, how many pairs each order served (0: evaluated directly), and the float32 operations spent."""

    pairs: int = 0
    direct: int = 0
    bound: float = 0.0
    orders: Counter = field(default_factory=Counter)
    flops: int = 0

    def add(self, scored: Scored, tolerance: float) -> None:
        """Count a scored part of a site of a certain tolerance."""
        self.pairs += scored.lpi.numel()
        self.direct += scored.direct
        self.flops += scored.flops
        self.orders += scored.orders
        self.bound = max(self.bound, scored.bound / tolerance)

    def as_dict(self) -> dict:
        return {
            "pairs": self.pairs,
            "direct_share": self.direct / self.pairs if self.pairs else 0.0,
            "largest_bound_of_tolerance": self.bound,
            "pairs_by_order": {str(order): count for order, count in sorted(self.orders.items())},
            "flops": self.flops,
        }


def of_neurons(
    unembedding: Unembedding, base: Base, parts: Sequence[Neurons], certificate: Certificate | None = None
) -> list[Tensor]:
    """LPI of every (prompt, neuron) pair of a site: a tensor [p, n] float64 (nats) for each of its parts.

    |error| <= tol (1 + |LPI|), tol = min(1e-6, max(1e-9, 1% of the site's median |LPI| of pairs with c != 0)).
    Raises NotFiniteError on input or output that is not finite.
    """
    return [scored.lpi for scored in _site(unembedding, base, parts, certificate or Certificate())]


def of_heads(
    unembedding: Unembedding, base: Base, neurons: Neurons, heads: int, certificate: Certificate | None = None
) -> tuple[Tensor, Tensor]:
    """LPI of the neurons of an attention site [P, n], and of its heads [P, heads], each the vector that its own
    n / heads consecutive neurons write together: float64, nats, to the same guarantee.
    """
    if heads < 1 or len(neurons.values) % heads:
        raise ValueError(f"{len(neurons.values)} neurons are not those of {heads} heads")
    (scored,) = _site(unembedding, base, [neurons], certificate or Certificate(), heads)
    return scored.lpi, scored.heads


def of_vectors(unembedding: Unembedding, base: Base, writes: Tensor) -> Tensor:
    """LPI of one vector a prompt (a layer's whole write) [P, d]: float64 [P], nats; formed in float64."""
    after = target_log_prob(unembedding, base.residual.double() + writes.double(), base.scale, base.target)
    return after - base.of_target


@dataclass
class Scored:
    """A part of a site: LPI [p, n], and of its heads [p, heads]; the largest ``bound`` of an error, how many pairs each
    order served and how many were evaluated directly, float32 operations. ``left``: which of those scores are still to
    be formed in float64."""

    lpi: Tensor
    heads: Tensor
    left: list[tuple[Tensor, moments.Left]] = field(default_factory=list)
    bound: float = 0.0
    orders: Counter = field(default_factory=Counter)
    direct: int = 0
    flops: int = 0

    @classmethod
    def empty(cls, part: Neurons, heads: int = 0) -> Scored:
        """Scores still to come."""
        lpi = torch.empty(part.coefficients.shape, dtype=torch.float64, device=part.coefficients.device)
        return cls(lpi, lpi.new_empty(len(lpi), heads))

    def served(self, orders: Tensor, direct: Tensor, bound: Tensor) -> None:
        """Count pairs [p, n] by the order of their neuron [n], those evaluated directly, and the bound of the
        others."""
        pairs = (~direct).sum(0)
        self.orders.update({int(k): int(pairs[orders == k].sum()) for k in orders.unique()})
        self.direct += int(direct.sum())
        self.bound = max(self.bound, float(bound.masked_fill(direct, 0).amax()) if bound.numel() else 0.0)


def _site(
    unembedding: Unembedding, base: Base, parts: Sequence[Neurons], certificate: Certificate, heads: int = 0
) -> list[Scored]:
    if not parts:
        return []
    if unembedding.cap is not None:
        return [_capped(unembedding, base, part, heads, certificate) for part in parts]
    # what is known only with the scores is guessed from their first order; half of it leaves room for the guess
    tolerance = tolerance_of([_first_order(base, part) for part in parts], parts, margin=0.5)
    found = _scored(unembedding, base, parts, tolerance, heads)
    while tolerance > (actual := tolerance_of([scored.lpi for scored in found], parts)):
        tolerance = max(1e-9, 0.5 * actual)
        found = _scored(unembedding, base, parts, tolerance, heads)
    for scored in found:
        certificate.add(finite(scored), tolerance)
    return found


def _scored(
    unembedding: Unembedding, base: Base, parts: Sequence[Neurons], tolerance: float, heads: int
) -> list[Scored]:
    vocabulary = len(unembedding.weight)
    blocks = [_blocks(*part.values.shape[:1], heads, vocabulary) for part in parts]
    largest = max((b.stop - b.start for several in blocks for b in several), default=0)
    space = unembedding.weight.new_empty(largest, vocabulary)
    found = [
        _part(unembedding, base, part, tolerance, heads, cut, space) for part, cut in zip(parts, blocks, strict=True)
    ]
    left = [pairs for scored in found for pairs in scored.left if len(pairs[1].row)]
    for (scores, pairs), exact in zip(left, moments.exact(unembedding, base, [p for _, p in left]), strict=True):
        scores[pairs.row, pairs.column] = exact
    return found


def _part(
    unembedding: Unembedding,
    base: Base,
    part: Neurons,
    tolerance: float,
    heads: int,
    blocks: list[slice],
    space: Tensor,
) -> Scored:
    base = base if part.rows is None else base.rows(part.rows)
    scored = Scored.empty(part, heads)
    width = len(part.values) // max(1, heads)
    for block in blocks:
        projection = Projection(unembedding, part.values[block], space)
        w, expected = projection.steps(part.coefficients[:, block], base)
        first = w * (base.gradient @ projection.unit.T)
        series = Series(projection, w, expected, base, tolerance)
        scored.lpi[:, block] = first - series.curvature
        scored.left.append((scored.lpi[:, block], series.left))
        scored.served(series.orders, series.direct, series.bound)
        scored.flops += series.flops
        if heads:
            own = scored.heads[:, block.start // width : block.stop // width]
            curvature, bound, left = moments.of_sums(projection, w, expected, base, width, tolerance)
            torch.sub(first.unflatten(1, (-1, width)).sum(2), curvature, out=own)
            scored.left += [(own, one) for one in left]
            scored.bound = max(scored.bound, bound)
    if part.rows is not None:
        for _, pairs in scored.left:
            pairs.prompt = part.rows[pairs.prompt]
    return scored


def _capped(unembedding: Unembedding, base: Base, part: Neurons, heads: int, certificate: Certificate) -> Scored:
    """Every pair by the definition in float64, because soft-capped logits are not affine."""
    base = base if part.rows is None else base.rows(part.rows)
    prompts, n = part.coefficients.shape
    m, values = part.coefficients.double() * base.scale[:, None], part.values.double()
    if not (m.isfinite().all() and values.isfinite().all()):
        raise NotFiniteError("coefficients, values or norm scales are not finite: check the weights")
    softmax, own = Softmax(prompts * n, m.device), Picked(base.target.repeat_interleave(n))
    for tile, z, rows in unembedding.tiles(base.residual, base.scale, capped=False):
        b = values @ rows.T
        for i in range(prompts):
            moved, pairs = unembedding.capped(z[i] + m[i, :, None] * b), slice(i * n, (i + 1) * n)
            own.add(moved, tile, pairs)
            softmax.add(moved, pairs)
    lpi = (own.logit - softmax.log_total()).view(prompts, n) - base.of_target[:, None]
    of_heads = [
        of_vectors(unembedding, base, part.coefficients[:, h].double() @ values[h])
        for h in (torch.arange(n, device=m.device).chunk(heads) if heads else ())
    ]
    scored = Scored(lpi, torch.stack(of_heads, 1) if heads else lpi[:, :0], direct=lpi.numel())
    certificate.add(finite(scored), 1.0)
    return scored


def _first_order(base: Base, part: Neurons) -> Tensor:
    """About m g.v, in float32: [p, n]."""
    rows = slice(None) if part.rows is None else part.rows
    return part.coefficients * base.scale[rows, None].float() * (base.gradient[rows].float() @ part.values.float().T)


def projected_elements(neurons: int, vocabulary: int) -> int:
    """The most elements of [neurons, V] that are held at once, of a site with so many neurons."""
    return min(neurons * vocabulary, max(_PROJECTED, vocabulary))


def _blocks(neurons: int, heads: int, vocabulary: int) -> list[slice]:
    """Neurons to project together so that memory stays bounded whatever the vocabulary: equal sizes, whole heads."""
    width = neurons // heads if heads else 1
    count = -(-neurons // max(1, _PROJECTED // vocabulary // width * width))
    step = -(-neurons // (max(1, count) * width)) * width
    return [slice(start, min(start + step, neurons)) for start in range(0, neurons, step)] if neurons else []


def tolerance_of(scores: Sequence[Tensor], parts: Sequence[Neurons], margin: float = 1.0) -> float:
    """The tolerance of a site (nats) by the scores of its parts, or by a share of them."""
    active = torch.cat([x[part.coefficients != 0].abs().float() for x, part in zip(scores, parts, strict=True)])
    return min(1e-6, max(1e-9, 0.01 * margin * float(active.median()))) if len(active) else 1e-6


def finite(scored: Scored) -> Scored:
    """The same, or NotFiniteError where a score is not finite."""
    if not (scored.lpi.isfinite().all() and scored.heads.isfinite().all()):
        raise NotFiniteError("LPI is not finite: a contribution is too large for float64; check the weights")
    return scored
