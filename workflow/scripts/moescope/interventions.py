"""Interventions on a loaded model, as context managers: what was changed comes back bit by bit, whatever happens.

To *zero* a neuron is to zero its value row in place, so that it writes nothing at any position whatever its
coefficient; a head is the block of neurons of the attention output that belongs to it. The bias of a site stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moescope.decomposition import Decomposition, Site
from moescope.errors import MoescopeError


class InterventionError(MoescopeError):
    """An intervention that would not do what it says: it names what the model does not have."""


@dataclass(frozen=True)
class Target:
    """Neurons of one site: its layer, its kind (attn, dense, shared, routed), of routed sites the expert."""

    layer: int
    kind: str
    neurons: Sequence[int]
    expert: int | None = None

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.kind}" + ("" if self.expert is None else f", expert {self.expert}")

    def site(self, decomposition: Decomposition) -> Site:
        """The site it names. Raises InterventionError where there is none, or where it names no neuron of it."""
        found = decomposition.at(self.layer, self.kind)
        if len(found) != 1:
            there = sorted({s.kind for s in decomposition.at(self.layer)})
            raise InterventionError(
                f"{self}: the model has {len(found)} such sites; layers go from 0 to "
                f"{len(decomposition.layers) - 1}, this one holds {', '.join(there) or 'nothing'}"
            )
        (site,) = found
        if (site.kind == "routed") != (self.expert is not None):
            raise InterventionError(f"{self}: name the expert of routed neurons, and of no others")
        if self.expert is not None and not 0 <= self.expert < site.experts:
            raise InterventionError(f"{self}: experts go from 0 to {site.experts - 1}")
        if not len(self.neurons):
            raise InterventionError(f"{self}: no neuron is named; name one at least")
        if min(self.neurons) < 0 or max(self.neurons) >= site.neurons:
            wrong = next(j for j in self.neurons if not 0 <= j < site.neurons)
            raise InterventionError(f"{self}: there is no neuron {wrong}; neurons go from 0 to {site.neurons - 1}")
        return site


def head(decomposition: Decomposition, layer: int, number: int) -> Target:
    """A head, as the neurons of the attention output that are its own.

    Raises InterventionError where the layer has no such head.
    """
    sites = decomposition.at(layer, "attn")
    heads, width = (sites[0].heads, sites[0].neurons // sites[0].heads) if len(sites) == 1 else (0, 0)
    if not 0 <= number < heads:
        raise InterventionError(f"layer {layer} has no head {number}: it has {heads}, counted from 0")
    return Target(layer, "attn", range(number * width, (number + 1) * width))


@contextlib.contextmanager
def zeroed(decomposition: Decomposition, targets: Iterable[Target]) -> Iterator[None]:
    """Zero the value rows of neurons while the context lasts.

    The stored weights are changed, whatever their dtype, so that ``precision.computing_in_float32`` upcasts the zeroed
    ones. Raises InterventionError, before anything is changed, where a target names what is not there, or where there
    is no target.
    """
    chosen = [(target, target.site(decomposition)) for target in targets]
    if not chosen:
        raise InterventionError("nothing to zero: no target is named; name one at least")
    with contextlib.ExitStack() as restoring:  # the last one changed comes back first, should two targets overlap
        for target, site in chosen:
            rows = site.stored(target.expert).detach()  # a view of the parameter itself: [neurons, hidden]
            index = torch.as_tensor(list(target.neurons), device=rows.device)
            restoring.callback(rows.index_copy_, 0, index, rows[index])
            rows[index] = 0
        yield
