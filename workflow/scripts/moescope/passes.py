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

from moescope import replay, routing
from moescope.clean import BATCH_TOKENS, CleanRun
from moescope.decomposition import LayerTrace
from moescope.routing import Routing

#: Tokens of one forward batch where nothing but the cache of a CPU bounds it.
_CACHED_TOKENS = 2_048
#: Prompts on which a pass that is taken up at another layer is tried.
_FEW = 8


@dataclass(frozen=True)
class Batch:
    """What runs at once: ``rows`` [B] among all prompts and their ``prefixes`` [B, T], as numbers."""

    rows: Tensor
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
        upcast = any(p.dtype != torch.float32 for p in model.parameters())  # which every batch pays for
        self.tokens = BATCH_TOKENS if upcast or device.type != "cpu" else _CACHED_TOKENS
        self.prefixes = 1 + max(int(group.prefixes.max()) for group in self.groups)
        self.label = torch.zeros(self.prefixes, dtype=torch.long, device=device)
        of_prompt = torch.as_tensor(self.labels, device=device)
        for group in self.groups:
            self.label[group.prefixes] = of_prompt[group.rows][:, None].expand_as(group.prefixes)
        self.layer, self.before = 0, LayerTrace()

    def start_at(self, layer: int, neurons: bool = False) -> None:
        """Go on to a later layer: one clean pass in all, whatever the number of stops; or begin anew at an earlier one.
        ``neurons``: what those of the feed-forward part before did is recorded too."""
        if layer < self.layer:
            self.layer, self.before = 0, LayerTrace()
        decomposition, before = self.clean.decomposition, LayerTrace()
        for group in self.groups if layer > self.layer else ():
            for part in self._parts(group, torch.arange(len(group.rows), device=group.rows.device)):
                prefixes = group.prefixes[part]
                with contextlib.ExitStack() as within:
                    within.enter_context(self._resumed(prefixes, self.before.residual_out))
                    recorded = replay.recording(decomposition, layer - 1, self.distinct)
                    did = within.enter_context(recorded) if neurons else LayerTrace()
                    hidden = replay.hidden_at(decomposition, layer, group.ids[part])
                first = self.distinct.first
                did.residual_out, did.gates = hidden.flatten(0, 1)[first], {}
                before.scatter(prefixes.flatten()[first], self.prefixes, did)
        if layer > self.layer:
            self.layer, self.before = layer, before

    def run(
        self, prompts: np.ndarray, stream: Tensor | None, during: During | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """log p(target) and rank of the prompts named in a mask [P], the stream being as given by prefix (None: not
        begun) and each batch running ``during`` what is given; what is not asked for is NaN and 0."""
        device, target = self.clean.decomposition.device, self.clean.target
        asked = torch.from_numpy(prompts).to(device)
        log_prob = torch.full((len(prompts),), torch.nan, dtype=torch.float64, device=device)
        rank = torch.zeros(len(prompts), dtype=torch.long, device=device)
        for group in self.groups:
            for part in self._parts(group, asked[group.rows].nonzero()[:, 0]):
                some, prefixes = group.rows[part], group.prefixes[part]
                with self._resumed(prefixes, stream), _holding(during, Batch(some, prefixes, self.distinct)):
                    logits = replay.last_logits(self.clean.model, group.ids[part])
                its = target[some]
                log_prob[some] = replay.log_prob(logits, its)
                rank[some] = 1 + (logits > logits.gather(1, its[:, None])).sum(1)
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

    def _parts(self, group: replay.Group, prompts: Tensor) -> tuple[Tensor, ...]:
        return prompts.split(max(1, self.tokens // group.ids.shape[1])) if len(prompts) else ()

    def _resumed(self, prefixes: Tensor, stream: Tensor | None) -> AbstractContextManager:
        self.distinct.of(prefixes)
        if stream is None:
            return contextlib.nullcontext()
        return replay.from_layer(self.clean.decomposition, self.layer, stream[prefixes])


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
