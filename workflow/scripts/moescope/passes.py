"""Passes over all prompts of a clean run, with something changed: what lies before the change is computed once.

Prompts run in batches of one length, each position once where what stands before it is equal (a *prefix*). Prompts may
be told apart by labels: those of different labels share no prefix, so that each can be treated differently within one
pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moescope import precision, replay, routing
from moescope.clean import BATCH_TOKENS, CleanRun
from moescope.decomposition import LayerTrace
from moescope.routing import Routing

#: Tokens of one forward batch where nothing but the cache of a CPU bounds it.
_CACHED_TOKENS = 2_048
#: Prompts on which a pass that is taken up at another layer is tried.
_FEW = 8


@dataclass(frozen=True)
class Batch:
    """What runs at once: ``rows`` [B] among all prompts, token ``ids`` and ``prefixes`` [B, T], these as numbers."""

    rows: Tensor
    ids: Tensor
    prefixes: Tensor
    _distinct: replay.Distinct

    def at(self, layer: int) -> Tensor:
        """The prefixes that the routed experts of a layer are given, in their order: [N]."""
        match self._distinct.given.get(layer):
            case "distinct":
                return self.prefixes.flatten()[self._distinct.first]
            case "last":
                return self.prefixes[:, -1]
        return self.prefixes.flatten()

    def last(self, layer: int) -> Tensor:
        """Where among them the last positions of the prompts stand: [B]."""
        at = self.at(layer)
        places = torch.zeros(int(self.prefixes.max()) + 1, dtype=torch.long, device=at.device)
        places[at] = torch.arange(len(at), device=at.device)
        return places[self.prefixes[:, -1]]


#: What holds while a batch runs.
During = Callable[[Batch], AbstractContextManager]


class Passes:
    """The prompts of a clean run, run from a given ``layer`` on with what that run put there.

    ``distinct``: of ``replay.sparing``, within which it lives; ``labels`` [P]: numbers from 0 that tell prompts apart.
    ``before``: what the layer before did, by prefix; ``label``: the label of each prefix.
    """

    def __init__(self, run: CleanRun, distinct: replay.Distinct, labels: Sequence[int] | None = None):
        self.clean, self.distinct = run, distinct
        self.labels = np.zeros(len(run.prompts), dtype=int) if labels is None else np.asarray(labels)
        self.groups = replay.by_length(run, self.labels.tolist())
        model, device = run.model, run.decomposition.device
        self.upcast = any(p.dtype != torch.float32 for p in model.parameters())
        self.tokens = BATCH_TOKENS if self.upcast or device.type != "cpu" else _CACHED_TOKENS
        self.prefixes = 1 + max(int(group.prefixes.max()) for group in self.groups)
        self.label = torch.zeros(self.prefixes, dtype=torch.long, device=device)
        of_prompt = torch.as_tensor(self.labels, device=device)
        for group in self.groups:
            self.label[group.prefixes] = of_prompt[group.rows][:, None].expand_as(group.prefixes)
        self.layer, self.before = 0, LayerTrace()

    @property
    def last(self) -> Tensor:
        """The prefix that each prompt is: [P]."""
        found = torch.zeros(len(self.labels), dtype=torch.long, device=self.label.device)
        for group in self.groups:
            found[group.rows] = group.prefixes[:, -1]
        return found

    def start_at(self, layer: int, neurons: bool = False) -> None:
        """Go on to a later layer: one clean pass in all, whatever the number of stops; or begin anew at an earlier one.
        ``neurons``: what those of the feed-forward part before did is recorded too."""
        if layer < self.layer:
            self.layer, self.before = 0, LayerTrace()
        if layer == self.layer:
            return
        decomposition, before = self.clean.decomposition, LayerTrace()
        batches = self._batches(np.ones(len(self.labels), dtype=bool))
        first, streams = self._through(batches, self._streams(batches, self.before.residual_out), layer - 1)
        with precision.held(decomposition.layers[layer - 1]):
            for batch, stream in zip(batches, streams, strict=True):
                with self._taken_up(batch, first, stream), self._recording(layer - 1, neurons) as did:
                    hidden = replay.hidden_at(decomposition, layer, batch.ids)
                distinct = self.distinct.first
                did.residual_out, did.gates = hidden.flatten(0, 1)[distinct], {}
                before.scatter(batch.prefixes.flatten()[distinct], self.prefixes, did)
        self.layer, self.before = layer, before

    def run(
        self, prompts: np.ndarray, stream: Tensor | None, during: During | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """log p(target) and rank of the prompts named in a mask [P], the stream being as given by prefix (None: not
        begun) and each batch running ``during`` what is given; what is not asked for is NaN and 0."""
        decomposition, target = self.clean.decomposition, self.clean.target
        log_prob = torch.full((len(prompts),), torch.nan, dtype=torch.float64, device=decomposition.device)
        rank = torch.zeros(len(prompts), dtype=torch.long, device=decomposition.device)
        batches = self._batches(prompts)
        first, streams = self._through(batches, self._streams(batches, stream), len(decomposition.layers), during)
        with precision.held(decomposition.head):
            for batch, hidden in zip(batches, streams, strict=True):
                with self._taken_up(batch, first, hidden), _holding(during, batch):
                    logits = replay.last_logits(self.clean.model, batch.ids)
                its = target[batch.rows]
                log_prob[batch.rows] = replay.log_prob(logits, its)
                rank[batch.rows] = 1 + (logits > logits.gather(1, its[:, None])).sum(1)
        return log_prob.cpu().numpy(), rank.cpu().numpy()

    def error(self, few: bool = False) -> float:
        """Largest difference of the clean run's log-probabilities here and in the whole pass, in nats; of a ``few``
        prompts of the least length, or of all. Raises ReplayError where it is too large."""
        logits, target = self.clean.trace.logits, self.clean.target
        asked = np.ones(len(target), dtype=bool)
        if few:
            asked[:] = False
            asked[self.groups[0].rows[:_FEW].cpu().numpy()] = True
        found, _ = self.run(asked, self.before.residual_out)
        return replay.verified(self.clean.model, found[asked], replay.log_prob(logits, target).cpu().numpy()[asked])

    def _recording(self, layer: int, neurons: bool) -> AbstractContextManager[LayerTrace]:
        if not neurons:
            return contextlib.nullcontext(LayerTrace())
        return replay.recording(self.clean.decomposition, layer, self.distinct)

    def _batches(self, prompts: np.ndarray) -> list[Batch]:
        """The prompts named in a mask [P]."""
        asked, found = torch.from_numpy(prompts).to(self.label.device), []
        for group in self.groups:
            some = asked[group.rows].nonzero()[:, 0]
            for part in some.split(max(1, self.tokens // group.ids.shape[1])) if len(some) else ():
                found.append(Batch(group.rows[part], group.ids[part], group.prefixes[part], self.distinct))
        return found

    def _streams(self, batches: Sequence[Batch], stream: Tensor | None) -> list[Tensor | None]:
        """What the layer to start at reads in each: [B, T, d]."""
        return [None if stream is None else stream[batch.prefixes] for batch in batches]

    def _through(
        self, batches: Sequence[Batch], streams: list[Tensor | None], to: int, during: During | None = None
    ) -> tuple[int, list[Tensor | None]]:
        """A layer before ``to``, or that, and what it reads in each batch. Blocks that have to be upcast run one after
        the other, each for all batches, so that it is upcast once; others wait until the whole pass is run."""
        if not self.upcast:
            return self.layer, streams
        for layer in range(self.layer, to):
            with precision.held(self.clean.decomposition.layers[layer]):
                for i, batch in enumerate(batches):
                    with self._taken_up(batch, layer, streams[i]), _holding(during, batch):
                        streams[i] = replay.hidden_at(self.clean.decomposition, layer + 1, batch.ids)
        return max(self.layer, to), streams

    def _taken_up(self, batch: Batch, layer: int, stream: Tensor | None) -> AbstractContextManager:
        self.distinct.of(batch.prefixes)
        if stream is None:
            return contextlib.nullcontext()
        return replay.from_layer(self.clean.decomposition, layer, stream)


def _holding(during: During | None, batch: Batch) -> AbstractContextManager:
    return contextlib.nullcontext() if during is None else during(batch)


@torch.no_grad()
def clean_routing(run: CleanRun, groups: Sequence[replay.Group]) -> tuple[dict[int, Routing], Tensor]:
    """What the routers choose in the clean run at every prefix, by layer; and how many positions of the prompts have
    each prefix [prefixes]. Whole passes: not within ``replay.sparing``, which leaves out what nobody reads."""
    found: dict[int, LayerTrace] = {}
    prefixes = 1 + max(int(group.prefixes.max()) for group in groups)
    times = torch.zeros(prefixes, dtype=torch.long, device=run.decomposition.device)
    for group in groups:
        size = max(1, _CACHED_TOKENS // group.ids.shape[1])
        for ids, numbers in zip(group.ids.split(size), group.prefixes.split(size), strict=True):
            with routing.watched(run.decomposition) as batch:
                replay.last_logits(run.model, ids)
            rows = numbers.flatten()
            times.index_add_(0, rows, torch.ones_like(rows))
            for layer, seen in batch.items():
                part = LayerTrace(router=seen.router, index=seen.index, weight=seen.weight)
                found.setdefault(layer, LayerTrace()).scatter(rows, prefixes, part)
    return {layer: Routing(one.router, one.index, one.weight) for layer, one in found.items()}, times
