"""The two ways to score neurons that the engine is measured against, in float32.

``published``: a vocabulary row per (prompt, neuron), the logits of the residual with the neuron's vector added.
``shared``: b = W v once for all prompts, then an exponential per token and pair.

``plain_published`` and ``plain_shared`` are these as one writes them, vectorised over the neurons of a site. The others
are as fast as they go without changing what they do: in tiles that stay in the cache, with every buffer used again,
each core on neurons of its own, so that none waits for another. They exponentiate relative to the unchanged
distribution, which saves looking for the largest logit: a neuron may move a logit by 80 nats before float32 overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

#: Neurons and tokens of a tile: of logits from a matrix product, which a few neurons would slow down, and of
#: exponentials (measured: the fastest of 16 to 512 neurons times 512 to 8192 tokens).
LOGITS, EXPONENTIALS = (256, 2048), (64, 2048)


@dataclass(frozen=True)
class Before:
    """The distributions of P prompts before anything is added: ``prob`` [P, V], ``log_total`` [P] the log sum exp of
    the logits, ``of_target`` [P] log p(target)."""

    prob: Tensor
    log_total: Tensor
    of_target: Tensor

    @classmethod
    def of(cls, weight: Tensor, offset: Tensor, residual: Tensor, scale: Tensor, target: Tensor) -> Before:
        """From weight [V, d], offset [V], residuals [P, d], norm scales [P] and targets [P]."""
        z = torch.addmm(offset, residual * scale[:, None], weight.T)
        of_target, top = z.gather(1, target[:, None])[:, 0], z.amax(1)
        total = z.sub_(top[:, None]).exp_().sum(1)
        log_total = top + total.log()
        return cls(z.div_(total[:, None]), log_total, of_target - log_total)

    def rows(self, rows: Tensor) -> Before:
        """The same for some of the prompts."""
        return Before(self.prob[rows], self.log_total[rows], self.of_target[rows])


def plain_published(
    weight: Tensor,
    offset: Tensor,
    values: Tensor,
    coefficients: Tensor,
    residual: Tensor,
    scale: Tensor,
    target: Tensor,
) -> Tensor:
    """LPI [p, n] by its definition, as one writes it: arguments as of ``published``."""
    out = torch.empty_like(coefficients)
    for p, token in enumerate(target):
        before = torch.addmv(offset, weight, residual[p] * scale[p]).log_softmax(-1)
        moved = (residual[p] + coefficients[p, :, None] * values) * scale[p]
        out[p] = torch.addmm(offset, moved, weight.T).log_softmax(-1)[:, token] - before[token]
    return out


def plain_shared(b: Tensor, coefficients: Tensor, scale: Tensor, target: Tensor, before: Before) -> Tensor:
    """The same from b = W v [n, V], as one writes it who uses memory again."""
    m, x = coefficients * scale[:, None], torch.empty_like(b)
    total = [torch.mul(b, step[:, None], out=x).exp_() @ prob for step, prob in zip(m, before.prob, strict=True)]
    return m * b[:, target].T - torch.stack(total).log()


def published(
    weight: Tensor,
    offset: Tensor,
    values: Tensor,
    coefficients: Tensor,
    residual: Tensor,
    scale: Tensor,
    target: Tensor,
    before: Before,
) -> Tensor:
    """LPI [p, n] by its definition: neurons ``values`` [n, d] with ``coefficients`` [p, n], ``weight`` [V, d] and
    ``offset`` [V] of the unembedding, residuals [p, d], norm scales [p], targets [p] and the distributions before."""
    out = torch.empty_like(coefficients)
    neurons, tokens = LOGITS

    def score(own: slice) -> None:
        buffer = weight.new_empty(neurons * tokens)
        for p in range(len(residual)):
            moved = values[own] * coefficients[p, own, None]
            moved.add_(residual[p]).mul_(scale[p])
            relative = offset - before.log_total[p]
            total = weight.new_zeros(len(moved))
            for tile in _slices(len(weight), tokens):
                z = buffer[: len(moved) * len(relative[tile])].view(len(moved), -1)
                torch.addmm(relative[tile], moved, weight[tile].T, out=z)
                total += z.exp_().sum(1)
            at_target = (moved @ weight[target[p]]).add_(relative[target[p]])
            out[p, own] = at_target.sub_(total.log_()).sub_(before.of_target[p])

    _by_core(score, _slices(len(values), neurons))
    return out


def shared(b: Tensor, coefficients: Tensor, scale: Tensor, target: Tensor, before: Before) -> Tensor:
    """The same from b = W v [n, V]: m b_t - log sum_j p_j exp(m b_j)."""
    m = coefficients * scale[:, None]
    total = torch.zeros_like(m)
    neurons, tokens = EXPONENTIALS

    def score(own: slice) -> None:
        buffer = b.new_empty(neurons * tokens)
        steps, sums = m[:, own].unsqueeze(2).unbind(0), total[:, own].unbind(0)
        for tile in _slices(b.shape[1], tokens):
            part = b[own, tile].contiguous()
            x = buffer[: part.numel()].view_as(part)
            for step, prob, one in zip(steps, before.prob[:, tile].unbind(0), sums, strict=True):
                torch.mul(part, step, out=x)
                one.addmv_(x.exp_(), prob)

    _by_core(score, _slices(len(b), neurons))
    return m * b[:, target].T - total.log_()


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _by_core(work: Callable[[slice], None], parts: list[slice]) -> None:
    """Work on all parts, each on one core: shared out, operations this small lose more time than they take."""
    cores = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, parts))
    finally:
        torch.set_num_threads(cores)
