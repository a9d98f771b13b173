"""The two ways to score neurons that the engine is measured against, as fast as they go without changing what they do.

``published``: a vocabulary row per (prompt, neuron), logits of the residual with the neuron's vector added. ``shared``:
W v once for all prompts, float32 exponentials per pair. Both in float32, with every buffer used again.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Elements of one block of logits (limited by memory), and of one tile of exponentials (by the cache).
_LOGITS, _TILE = 2**26, 2**17


def published(
    weight: Tensor,
    offset: Tensor,
    values: Tensor,
    coefficients: Tensor,
    residual: Tensor,
    scale: Tensor,
    target: Tensor,
) -> Tensor:
    """LPI [p, n] of neurons ``values`` [n, d] with ``coefficients`` [p, n], residuals [p, d], norm scales [p]: the
    definition, a row of logits for each pair."""
    out = torch.empty_like(coefficients)
    block = max(1, min(len(values), _LOGITS // len(weight)))
    logits = weight.new_empty(block, len(weight))
    for p in range(len(residual)):
        before = (weight @ (residual[p] * scale[p]) + offset).log_softmax(0)[target[p]]
        for first in range(0, len(values), block):
            own = slice(first, first + block)
            moved = values[own] * coefficients[p, own, None]
            moved.add_(residual[p]).mul_(scale[p])
            z = torch.mm(moved, weight.T, out=logits[: len(moved)])
            if offset.any():
                z += offset
            at_target, top = z[:, target[p]].clone(), z.amax(1)
            total = z.sub_(top[:, None]).exp_().sum(1).log_().add_(top)
            out[p, own] = at_target - total - before
    return out


def shared(
    weight: Tensor,
    offset: Tensor,
    values: Tensor,
    coefficients: Tensor,
    residual: Tensor,
    scale: Tensor,
    target: Tensor,
) -> Tensor:
    """The same from b = W v, formed once: m b_t - log sum_j p_j exp(m b_j)."""
    b = values @ weight.T
    out = coefficients * scale[:, None] * b[:, target].T
    neurons = max(1, _TILE // 2048)
    buffer = weight.new_empty(neurons, 2048)
    for p in range(len(residual)):
        prob = (weight @ (residual[p] * scale[p]) + offset).softmax(0)
        for first in range(0, len(values), neurons):
            own = slice(first, first + neurons)
            m = (coefficients[p, own] * scale[p])[:, None]
            total = weight.new_zeros(len(m))
            for start in range(0, len(weight), 2048):
                part = b[own, start : start + 2048]
                x = torch.mul(part, m, out=buffer[: len(m), : part.shape[1]])
                total.addmv_(x.exp_(), prob[start : start + 2048])
            out[p, own] -= total.log_()
    return out
