"""Interventions on a loaded model, as context managers: what was changed comes back bit by bit, whatever happens. They
may be nested, the last to begin being the first to end.

To *zero* a neuron is to zero its value row in place, so that it writes nothing at any position whatever its
coefficient; a head is the block of neurons of the attention output that belongs to it. The bias of a site stays.

To *block* experts is to keep the router of a layer from using them, at all positions. What happens to their slot and to
the weights of the others is another matter for each of the four ways to do it (``Blocking``). They are done inside the
router's own forward pass, so that its corrections, groups, normalisation and scaling stay the family's. To *force* an
expert is to have it run at every position with a given weight, beside those that the router chose. A budget of
``slots`` uses some of those that the router chose alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moescope.decomposition import Decomposition, Site
from moescope.errors import MoescopeError
from moescope.patching import patched


class InterventionError(MoescopeError):
    """An intervention that would not do what it says: it names what the model does not have."""


class BlockingError(InterventionError):
    """Experts that a router cannot be kept from in the way that is asked for."""


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
    heads = sites[0].heads if len(sites) == 1 else 0
    if not 0 <= number < heads:
        raise InterventionError(f"layer {layer} has no head {number}: it has {heads}, counted from 0")
    width = sites[0].neurons // heads
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


#: How experts are blocked.
#:
#: ``reroute``: their score is -inf where it enters the choice of the top k, so that the next experts take their slots;
#: the probabilities of all others stay what they are, and the family normalises and scales those of the chosen.
#: ``reroute_logit``: their logit is -inf, so that a softmax shares out what they had among all others, and a sigmoid
#: gives 0. (A correction of the choice may pick such an expert all the same: then its weight is 0.)
#: ``min_logit``: their logit is the least of the token's, and they lose the choice after any correction or group limit.
#: ``zero_weight``: the choice stays, their weight is 0; nobody takes their slot, and no other weight changes.
Blocking = Literal["reroute", "reroute_logit", "min_logit", "zero_weight"]
#: Experts by layer: their numbers, or, for each of the N positions that the layer is given, which of its E experts
#: (bool [N, E]).
Experts = Mapping[int, Sequence[int] | Tensor]
#: Which slots of a router are left.
Slots = Literal["top_n", "only_rank", "drop_rank"]


def block(
    decomposition: Decomposition, experts: Experts, how: Blocking = "reroute"
) -> contextlib.AbstractContextManager:
    """Block experts, named by layer, in one of four ways while the context lasts (the functions of those names).

    A mask by position holds for a batch of just these positions, prompt after prompt.
    """
    ways = {"reroute": reroute, "reroute_logit": reroute_logit, "min_logit": min_logit, "zero_weight": zero_weight}
    if how not in ways:
        raise InterventionError(f"{how}: experts are blocked by {', '.join(ways)}")
    return ways[how](decomposition, experts)


def reroute(decomposition: Decomposition, experts: Experts) -> contextlib.AbstractContextManager:
    """The score of some experts is -inf where it enters the choice of the top k; see ``Blocking``.

    Raises InterventionError where a layer or an expert is not there, and, in the forward pass, where a router makes no
    top-k choice or has to choose a blocked expert for want of others.
    """
    return _choosing(decomposition, experts, scores=_impossible)


def reroute_logit(decomposition: Decomposition, experts: Experts) -> contextlib.AbstractContextManager:
    """The logit of some experts is -inf before anything is made of it; see ``Blocking``.

    Raises InterventionError where a layer or an expert is not there, and, in the forward pass, where the router has no
    logits that could be changed, or gives such an expert a weight all the same.
    """
    return _choosing(decomposition, experts, logits=_impossible)


def min_logit(decomposition: Decomposition, experts: Experts) -> contextlib.AbstractContextManager:
    """The logit of some experts is the least of their token's, and they lose the choice; see ``Blocking``.

    Raises what ``reroute`` raises, but a router may choose otherwise than by top k.
    """
    return _choosing(decomposition, experts, logits=_least, scores=_impossible, or_otherwise=True)


def zero_weight(decomposition: Decomposition, experts: Experts) -> contextlib.AbstractContextManager:
    """The weight of some experts is 0 wherever they are chosen, that of no other changes; see ``Blocking``.

    Raises InterventionError where a layer or an expert is not there.
    """
    blocked = dict(_named(decomposition, experts))

    def drop(site: Site, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, index, weight = args
        return hidden, index, weight.masked_fill(_chosen(blocked[site], index), 0)

    return _given(blocked, drop)


def force(
    decomposition: Decomposition, layer: int, expert: int, weight: float | Tensor
) -> contextlib.AbstractContextManager:
    """Have an expert run at every position with ``weight``, one for all or one for each of the N positions of a batch
    ([N], prompt after prompt). Where the router chose it, that is its weight now; elsewhere it comes in addition.

    ``routing.Routing.weight_of`` gives the weight that the router would have given. Raises InterventionError where the
    layer or the expert is not there, and, in the forward pass, where there is not a weight for each position.
    """
    ((site, _),) = _named(decomposition, {layer: [expert]})

    def insert(site: Site, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, index, weights = args
        given = torch.as_tensor(weight, dtype=weights.dtype, device=weights.device)
        if not given.isfinite().all():
            raise InterventionError(f"layer {layer}, expert {expert}: a weight is no number")
        if given.dim() and given.shape != index.shape[:1]:
            raise InterventionError(
                f"layer {layer}, expert {expert}: {given.numel()} weights for {len(index)} positions; give one "
                "for each, or one for all"
            )
        given = given.expand(len(index))[:, None]
        there = index == expert
        chosen, weights = there.any(1, keepdim=True), torch.where(there, given, weights)
        if chosen.all():
            return hidden, index, weights
        # where it is chosen already, one more slot goes to an expert that is not, with no weight
        busy = torch.zeros(len(index), site.experts, dtype=torch.int, device=index.device).scatter(1, index.long(), 1)
        extra = torch.where(chosen, busy.argmin(1, keepdim=True).to(index.dtype), expert)
        return hidden, torch.cat([index, extra], 1), torch.cat([weights, given.masked_fill(chosen, 0)], 1)

    return _given([site], insert)


def slots(
    decomposition: Decomposition,
    mode: Slots,
    n: int,
    weights: Literal["family", "keep"] = "family",
) -> contextlib.AbstractContextManager:
    """Use some of the K slots of every router alone, at all layers and positions, slots ranked by their weight from 1.

    ``mode``: the ``n`` largest (``top_n``, n from 0), the one of rank n (``only_rank``), or all but it (``drop_rank``).
    ``weights``: ``family`` gives those that are left what the family's rule gives when nothing else is chosen (where
    the weights of a position always have one sum, they have it still), ``keep`` what they had. Raises InterventionError
    where no layer routes, or a rank is not there; run ``trace`` before, which shows what the family's rule is.
    """
    sites = decomposition.routed()
    if not sites:
        raise InterventionError("no layer routes between experts; name a mixture of experts")
    if mode not in get_args(Slots) or weights not in ("family", "keep"):
        raise InterventionError(f"{mode}, {weights}: slots are {', '.join(get_args(Slots))}, weights family or keep")
    if weights == "family" and any(site.layer not in decomposition.normalises for site in sites):
        raise InterventionError("whether weights are normalised is not known; trace some prompts first")
    renormalised = {site.layer: weights == "family" and decomposition.normalises[site.layer] for site in sites}
    return _given(sites, lambda site, args: _fewer(mode, n, renormalised[site.layer], *args))


def _fewer(
    mode: Slots, n: int, renormalised: bool, hidden: Tensor, index: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    k = index.shape[1]
    if not (0 if mode == "top_n" else 1) <= n <= k:
        raise InterventionError(f"{mode} {n}: the router fills {k} slots, counted from 1")
    rank = torch.empty_like(index).scatter_(
        1,
        weight.argsort(dim=1, descending=True, stable=True).to(index.dtype),
        torch.arange(1, k + 1).to(index).expand_as(index),
    )
    left = {"top_n": rank <= n, "only_rank": rank == n, "drop_rank": rank != n}[mode]
    fewer = torch.where(left, weight, 0)
    total = fewer.sum(1, keepdim=True)
    if renormalised:
        fewer = torch.where(total > 0, fewer * weight.sum(1, keepdim=True) / total, fewer)
    return hidden, index, fewer


@contextlib.contextmanager
def without_shared(decomposition: Decomposition) -> Iterator[None]:
    """Shared experts write nothing, neither neurons nor bias. Raises InterventionError where there is none."""
    sites = [site for site in decomposition.sites if site.kind == "shared"]
    if not sites:
        raise InterventionError("no layer has a shared expert")
    with contextlib.ExitStack() as hooks:
        for site in sites:
            hooks.callback(site.module.register_forward_hook(lambda m, args, out: torch.zeros_like(out)).remove)
        yield


@contextlib.contextmanager
def _given(sites: Iterable[Site], change: Callable[[Site, tuple], tuple]) -> Iterator[None]:
    """Give the experts of some sites other (hidden, index, weight) than their routers did."""
    with contextlib.ExitStack() as hooks:
        for site in sites:
            hook = lambda m, args, site=site: change(site, args)  # noqa: E731
            hooks.callback(site.module.register_forward_pre_hook(hook).remove)
        yield


def _named(decomposition: Decomposition, experts: Experts) -> list[tuple[Site, Tensor]]:
    """The sites of the layers that are named, and which of their experts: bool [1 or N, E]; each must be there."""
    if not isinstance(experts, Mapping) or not all(map(_are_experts, experts.values())):
        raise InterventionError(f"{experts}: name experts as lists of numbers by layer, {{layer: [expert, ...]}}")
    if not any(len(named) for named in experts.values()):
        raise InterventionError("no expert is named; name one at least")
    found = []
    for layer, named in experts.items():
        for number in [0] if isinstance(named, Tensor) else named:
            Target(layer, "routed", [0], number).site(decomposition)
        if len(named):
            found.append((site := decomposition.at(layer, "routed")[0], _mask(named, site)))
    return found


def _mask(named: Sequence[int] | Tensor, site: Site) -> Tensor:
    if isinstance(named, Tensor):
        if named.shape[1] != site.experts:
            raise InterventionError(
                f"layer {site.layer}: {named.shape[1]} experts by position, the layer has {site.experts}"
            )
        return named
    mask = torch.zeros(1, site.experts, dtype=torch.bool)
    mask[0, list(named)] = True
    return mask


def _chosen(mask: Tensor, index: Tensor) -> Tensor:
    """Which of the chosen experts [N, K] are among those of the mask [1 or N, E]."""
    everyone = index.new_zeros(len(index), mask.shape[1], dtype=torch.bool)
    return (everyone | _by_position(mask.to(index.device), everyone)).gather(1, index.long())


def _are_experts(named: object) -> bool:
    if isinstance(named, Tensor):
        return named.dim() == 2 and named.dtype == torch.bool
    return isinstance(named, Sequence) and all(isinstance(number, int) for number in named)


Change = Callable[[Tensor, Tensor], Tensor]


def _impossible(x: Tensor, experts: Tensor) -> Tensor:
    return x.masked_fill(_by_position(experts, x), -torch.inf)


def _least(x: Tensor, experts: Tensor) -> Tensor:
    return torch.where(_by_position(experts, x), x.amin(-1, keepdim=True), x)


def _by_position(experts: Tensor, x: Tensor) -> Tensor:
    """The mask [1 or N, E] as x [..., E] has its positions."""
    if len(experts) not in (1, x.shape[:-1].numel()):
        positions = x.shape[:-1].numel()
        raise InterventionError(f"experts are named at {len(experts)} positions, {positions} run; name them at each")
    return experts if len(experts) == 1 else experts.view_as(x)


class _Inside(TorchFunctionMode):
    """What a router computes, changed on the way: the logits that its matrix gives, the scores of all experts that it
    chooses the top k of (the choice between groups of experts is another)."""

    def __init__(self, count: int, experts: Tensor, logits: Change | None, scores: Change | None):
        super().__init__()
        self.count, self.experts, self.logits, self.scores = count, experts, logits, scores
        self.met: set[str] = set()
        #: whether there were too few experts to choose from
        self.short = False

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if self.scores and func in (torch.topk, Tensor.topk) and args[0].shape[1:] == (self.count,):
            self.met.add("scores")
            found = func(self.scores(args[0], self.experts.to(args[0].device)), *args[1:], **(kwargs or {}))
            self.short |= bool(found.values.isneginf().any())  # of blocked ones, or of those of another group
            return found
        found = func(*args, **(kwargs or {}))
        if self.logits and func is F.linear and found.shape[-1] == self.count:
            self.met.add("logits")
            found = self.logits(found, self.experts.to(found.device))
        return found


@dataclass(frozen=True)
class _Rerouted:
    """The forward pass of a router with the logits or the scores of some experts [1 or N, E] changed. None of them may
    come out with a weight, or, where their scores are changed, chosen. ``or_otherwise``: a choice that is not one of
    the top k will do."""

    where: str
    count: int
    experts: Tensor
    logits: Change | None
    scores: Change | None
    or_otherwise: bool

    def __call__(self, run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        return functools.partial(self.forward, run)

    def forward(self, run: Callable[..., tuple[Tensor, ...]], *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        """What the router says."""
        with _Inside(self.count, self.experts, self.logits, self.scores) as inside:
            said = run(*args, **kwargs)
        for name, change in {"logits": self.logits, "scores": None if self.or_otherwise else self.scores}.items():
            if change is not None and name not in inside.met:
                raise self.impossible(f"their router has no {name} that could be changed; block them another way")
        self.require_left_out(said, inside.short)
        return said

    def require_left_out(self, said: tuple[Tensor, ...], short: bool) -> None:
        if not (isinstance(said, tuple) and len(said) >= 3):
            raise self.impossible("their router does not say what it chose; use zero_weight")
        _, weight, index = said[:3]
        chosen = _chosen(self.experts, index)
        if short or (self.scores is not None and chosen.any()):
            raise self.impossible("too few others can take their place; block fewer of them, or use zero_weight")
        if weight[chosen].any():
            raise self.impossible("their router gives them a weight all the same; use min_logit or zero_weight")
        if not weight.isfinite().all():
            raise self.impossible("their router gives weights that are no numbers; use zero_weight")

    def impossible(self, why: str) -> BlockingError:
        return BlockingError(f"{self.where}: {why}")


@contextlib.contextmanager
def _choosing(
    decomposition: Decomposition,
    experts: Experts,
    logits: Change | None = None,
    scores: Change | None = None,
    or_otherwise: bool = False,
) -> Iterator[None]:
    """Run the routers of some layers with logits or scores changed (``_Rerouted``)."""
    with contextlib.ExitStack() as restoring:
        for site, mask in _named(decomposition, experts):
            where = f"layer {site.layer}, experts {mask.any(0).nonzero()[:, 0].tolist()}"
            if site.router is None:
                raise BlockingError(f"{where}: what chooses between them was not found; use zero_weight")
            rerouted = _Rerouted(where, site.experts, mask, logits, scores, or_otherwise)
            restoring.enter_context(patched(site.router, rerouted))
        yield
