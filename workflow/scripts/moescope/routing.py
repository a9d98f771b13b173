"""What the routers of a loaded model choose, at every position of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from moescope.decomposition import SCORINGS, Decomposition, Site, scoring_of
from moescope.errors import MoescopeError


class RoutingError(MoescopeError):
    """A weight that a router would not give."""


@dataclass
class Routing:
    """The choice of one layer at N positions, prompt after prompt: ``router`` [N, E] what its router says of all
    experts, ``index`` and ``weight`` [N, K] the experts that are used and how much of each."""

    router: Tensor | None = None
    index: Tensor | None = None
    weight: Tensor | None = None

    @property
    def probability(self) -> Tensor | None:
        """What the router makes of its logits before it chooses: [N, E]; None where its weights are no shares of it."""
        if self.router is None:
            return None
        scoring = scoring_of([(self.router, self.index, self.weight)])
        return None if scoring is None else SCORINGS[scoring](self.router.float())

    def weight_of(self, expert: int) -> Tensor:
        """What the weight of an expert is, or would be beside those chosen: its probability, times what the family
        makes of theirs: [N]. Raises RoutingError where there is no such expert, and where there is no probability."""
        probability = self.probability
        if probability is None:
            raise RoutingError(
                "what was watched are no shares of a probability, be it by an intervention; watch a clean run, or "
                "choose a weight yourself"
            )
        if not 0 <= expert < probability.shape[1]:
            raise RoutingError(f"there is no expert {expert}; experts go from 0 to {probability.shape[1] - 1}")
        scale = self.weight.float().sum(1) / probability.gather(1, self.index).sum(1)
        return probability[:, expert] * scale


@contextlib.contextmanager
def watched(decomposition: Decomposition) -> Iterator[dict[int, Routing]]:
    """The routing of every layer that routes, by layer, of the last batch that runs within the context."""
    found: dict[int, Routing] = {}

    def used(site: Site, args: tuple[Tensor, ...]) -> None:
        _, index, weight = args
        routing = found.setdefault(site.layer, Routing())
        routing.index, routing.weight = index.detach().long(), weight.detach()

    def said(site: Site, output: object) -> None:
        if isinstance(output, tuple) and len(output) >= 3:  # (logits, weights, indices)
            found.setdefault(site.layer, Routing()).router = output[0].detach()

    with contextlib.ExitStack() as hooks:
        for site in decomposition.routed():
            # behind the experts, so that what interventions made of their input is seen, whoever came first
            hooks.callback(site.module.register_forward_hook(lambda m, args, out, s=site: used(s, args)).remove)
            if site.router is not None:
                hooks.callback(site.router.register_forward_hook(lambda m, args, out, s=site: said(s, out)).remove)
        yield found
