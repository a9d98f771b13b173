"""The forward pass taken up again in the middle: what lies before an intervention is computed once.

The residual stream between two layers is all that the later ones see, so layers that are skipped hand on a recorded
stream. After the last but one position of a prompt is done, its keys and values are all that the last position sees:
then a changed residual there costs one token, not a prompt.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from moescope import precision
from moescope.clean import CleanRun
from moescope.decomposition import (
    Decomposition,
    LayerTrace,
    Site,
    first_of,
    hidden_of,
    multiplier_of,
    routed_coefficients,
)
from moescope.errors import MoescopeError
from moescope.patching import patched

#: Largest difference between a prompt's clean log-probability in a replay and in the whole pass (nats).
TOLERANCE = 1e-3


class ReplayError(MoescopeError):
    """A model whose forward pass cannot be taken up in the middle."""


class Stop(Exception):
    """Ends a forward pass of which no more is wanted; no error."""


class _Skipped(nn.Module):
    """In the place of a layer: hands on what it is told, and costs nothing, not even the upcast of weights."""

    def __init__(self, layer: nn.Module, hidden: Tensor, returns: int):
        super().__init__()
        # past nn.Module, which would make the layer a child
        self.__dict__.update(layer=layer, hidden=hidden, returns=returns)

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["layer"], name)  # models ask layers for their kind of attention

    def forward(self, *_: object, **__: object) -> Tensor | tuple:
        # of what a layer returns beside, no more than the number matters: nobody reads it
        return (self.hidden, *[None] * (self.returns - 1)) if self.returns else self.hidden


@contextlib.contextmanager
def from_layer(decomposition: Decomposition, layer: int, hidden: Tensor) -> Iterator[None]:
    """Start at a layer: within the context a run on token ids [B, T] begins with ``hidden`` [B, T, d], what that layer
    read when it was recorded (``layer`` = number of layers: the final norm)."""

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    layers = decomposition.layers
    with contextlib.ExitStack() as restoring:
        for i in range(layer):
            restoring.callback(layers.__setitem__, i, layers[i])
            layers[i] = _Skipped(layers[i], hidden, decomposition.returns.get(i, 0))
        begins = _reader_of(decomposition, layer)
        restoring.callback(begins.register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


def _reader_of(decomposition: Decomposition, layer: int) -> nn.Module:
    """The layer of that number, or the final norm behind the last."""
    return decomposition.layers[layer] if layer < len(decomposition.layers) else decomposition.norm


@torch.no_grad()
def hidden_at(decomposition: Decomposition, layer: int, ids: Tensor) -> Tensor:
    """What a layer (``layer`` = number of layers: the final norm) reads at all positions of token ids [B, T], where the
    pass ends: [B, T, d]. Within ``from_layer`` of an earlier layer it goes on from there."""
    layers, read, ran = decomposition.layers, [], []

    def reached(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if layer < len(layers) or ran:  # a norm that stands before the layers too is not what is meant
            read.append(hidden_of(args, kwargs))
            raise Stop

    with contextlib.ExitStack() as hooks, contextlib.suppress(Stop):
        # first of all its hooks: a block that is not to run need not be upcast
        reader = _reader_of(decomposition, layer)
        hooks.callback(reader.register_forward_pre_hook(reached, prepend=True, with_kwargs=True).remove)
        hooks.callback(layers[-1].register_forward_hook(lambda *_: ran.append(True)).remove)
        last_logits(decomposition.model, ids)
    return read[0]


@contextlib.contextmanager
def recording(decomposition: Decomposition, layer: int, distinct: Distinct) -> Iterator[LayerTrace]:
    """The record of a layer's feed-forward neurons at the n distinct positions of a batch that runs within the context:
    ``coefficients`` and ``index`` alone, without what a norm behind the branch makes of them."""
    record = LayerTrace()

    def linear(site: Site, args: tuple) -> None:
        record.coefficients[site.name] = distinct.rows(args[0])

    def gate(site: Site, output: Tensor) -> None:
        record.gates[site.name] = distinct.rows(output.sigmoid())

    def experts(site: Site, args: tuple) -> None:
        hidden, record.index, weight = (distinct.rows(x) for x in args)
        record.coefficients[site.name] = routed_coefficients(site.module, hidden, record.index, weight)

    with contextlib.ExitStack() as hooks:
        for site in decomposition.at(layer, "dense", "shared", "routed"):
            before = experts if site.kind == "routed" else linear
            hooks.callback(site.module.register_forward_pre_hook(lambda m, a, s=site, f=before: f(s, a)).remove)
            if site.gate is not None:
                hooks.callback(site.gate.register_forward_hook(lambda m, a, out, s=site: gate(s, out)).remove)
        yield record
    for name, scale in record.gates.items():
        record.coefficients[name] = record.coefficients[name] * scale
    multiplier = multiplier_of(decomposition.layers[layer])
    if multiplier != 1.0:
        record.coefficients = {name: c * multiplier for name, c in record.coefficients.items()}


def last_logits(model: nn.Module, ids: Tensor, **cache: object) -> Tensor:
    """The model's logits at the last position of token ids [B, T] without padding: float32 [B, V]."""
    return _run(model, ids, **{"use_cache": False, **cache}).logits[:, -1].float()


def _run(model: nn.Module, ids: Tensor, **options: object) -> object:
    router = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    return model(ids, logits_to_keep=1, **options, **router)


def log_prob(logits: Tensor, target: Tensor) -> Tensor:
    """log p(target) of float32 logits [n, V], targets [n]: float64 [n], to 2e-7 nats of log-softmax in float64.

    Differences from the largest logit are exact to their own size, so that float32 exponentials lose nothing that
    counts; in float64 they would take most of the time of a small model.
    """
    largest = logits.amax(1, keepdim=True)
    total = (logits - largest).exp_().sum(1)
    return (logits.gather(1, target[:, None]).double() - largest.double())[:, 0] - total.double().log()


def verified(model: nn.Module, found: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference (nats) between log-probabilities of the clean run in a pass that was taken up in the
    middle and in the whole one. Raises ReplayError where it is too large."""
    error = float(np.abs(found - truth).max())
    if not error <= TOLERANCE:
        raise ReplayError(
            f"{type(model).__name__}: a pass taken up in the middle misses the whole one by {error:.1e} nats (allowed: "
            f"{TOLERANCE:.0e}); this architecture is not supported"
        )
    return error


@dataclass(frozen=True)
class Group:
    """Prompts of one length: ``rows`` [n] among all prompts, token ``ids`` [n, T], and ``prefixes`` [n, T]: equal
    numbers where everything up to a position is equal."""

    rows: Tensor
    ids: Tensor
    prefixes: Tensor


def by_length(run: CleanRun, labels: Sequence[int] | None = None) -> list[Group]:
    """The prompts in batches without padding, shortest first, those that begin alike beside each other. Prompts of
    different ``labels`` [P] (from 0; None: all alike) have no prefix in common."""
    labels = [0] * len(run.targets) if labels is None else labels
    numbers: dict[tuple[int, int], int] = {}
    groups: dict[int, list[tuple[tuple[int, ...], int, list[int]]]] = defaultdict(list)
    for row, (target, label) in enumerate(zip(run.targets, labels, strict=True)):
        path = [-1 - label]
        for token in target.tokens:
            path.append(numbers.setdefault((path[-1], token), len(numbers)))
        groups[len(target.tokens)].append((target.tokens, row, path[1:]))
    device = run.decomposition.device
    columns = (zip(*sorted(groups[length]), strict=True) for length in sorted(groups))
    return [Group(*(torch.tensor(c, device=device) for c in (rows, ids, paths))) for ids, rows, paths in columns]


class Distinct:
    """The positions of a batch that are computed by what works position by position: one per distinct prefix.

    ``given``: which positions the routed experts of a layer were given when they ran: ``distinct`` ones, the ``last``
    of every prompt, or, where it is not named, all.
    """

    def __init__(self, experts: Mapping[int, str]) -> None:
        self.first: Tensor | None = None
        self.place: Tensor | None = None
        self.given: dict[int, str] = {}
        self._experts = experts
        self._inside = False

    def of(self, prefixes: Tensor) -> None:
        """The batch that runs next has these prefixes [B, T]."""
        found, place = prefixes.unique(return_inverse=True)
        self.place = place.flatten()
        everywhere = torch.arange(len(self.place), device=place.device)
        self.first = self.place.new_empty(len(found)).scatter_(0, self.place, everywhere)

    def run(
        self, layer: int, branch: str, forward: Callable[..., object], hidden: Tensor, *args: object, **kwargs: object
    ) -> object:
        """A position-wise module of a layer on hidden states [B, T, d], at the distinct positions."""
        if self.first is None or not _works_on(hidden, args):
            return forward(hidden, *args, **kwargs)
        self._note(layer, branch, "distinct")
        self._inside = True
        try:
            out = forward(hidden.flatten(0, 1)[self.first][None], *args, **kwargs)
        finally:
            self._inside = False
        return _replaced(out, first_of(out)[0][self.place].view_as(hidden))

    def run_last(
        self, layer: int, branch: str, forward: Callable[..., object], hidden: Tensor, *args: object, **kwargs: object
    ) -> object:
        """The same at the last position of every prompt; it writes nothing elsewhere."""
        if not _works_on(hidden, args):
            return forward(hidden, *args, **kwargs)
        self._note(layer, branch, "last")
        out = forward(hidden[:, -1:], *args, **kwargs)
        written = torch.zeros_like(hidden)
        written[:, -1:] = first_of(out)
        return _replaced(out, written)

    def _note(self, layer: int, branch: str, given: str) -> None:
        if self._experts.get(layer) == branch:
            self.given[layer] = given

    def rows(self, x: Tensor) -> Tensor:
        """What is seen [..., n] while the batch runs, a row per distinct prefix, whether it is seen in a module that
        runs for those alone or in one that runs for all positions."""
        flat = x.flatten(0, -2)
        return flat if self._inside else flat[self.first]


def _works_on(hidden: Tensor, others: tuple) -> bool:
    """Whether a module is given hidden states [B, T, d] and nothing else that goes by position."""
    return hidden.dim() == 3 and not any(isinstance(other, Tensor) for other in others)


def _replaced(output: object, first: Tensor) -> object:
    return (first, *output[1:]) if isinstance(output, tuple) else first


@contextlib.contextmanager
def sparing(decomposition: Decomposition) -> Iterator[Distinct]:
    """Leave out what nobody reads and what is known: feed-forward parts run once for positions whose prefixes are equal
    (named for each batch with ``Distinct.of``), those of the last layer at the last position alone (no padding).

    Changes nothing at the last position, as long as feed-forward parts work position by position. Those that are a bare
    matrix of the layer (OPT), or are given more than hidden states (BLOOM), run in full.
    """
    distinct, last = (
        Distinct({site.layer: site.branch for site in decomposition.routed()}),
        len(decomposition.layers) - 1,
    )
    parts = {(s.layer, s.branch) for s in decomposition.sites if s.component == "ffn" and s.name != s.branch}
    with contextlib.ExitStack() as restoring:
        for layer, branch in parts:
            module = decomposition.layers[layer].get_submodule(branch)
            spare = functools.partial(distinct.run_last if layer == last else distinct.run, layer, branch)
            restoring.enter_context(patched(module, lambda forward, spare=spare: functools.partial(spare, forward)))
        yield distinct


class LastPosition:
    """The last position of n prompts of one length, run again from a residual after any layer.

    Holds the keys and values of all positions before it: n x T x layers x 2 x width of the keys, float32.
    """

    @torch.no_grad()
    def __init__(self, decomposition: Decomposition, ids: Tensor, target: Tensor):
        """``ids`` [n, T] without padding, ``target`` [n]."""
        self.decomposition, self.model = decomposition, decomposition.model
        self.last, self.target = ids[:, -1:], target
        before = ids[:, :-1]
        self.cache = _run(self.model, before, use_cache=True).past_key_values if before.shape[1] else None

    def _cache(self, layer: int, prompts: Tensor) -> dict:
        """Keys, values and states of some prompts for the layers from ``layer`` on; what a run adds is its own."""
        if self.cache is None:
            return {}
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(one) for one in self.cache.layers]
        for mine, clean in zip(cache.layers[layer:], self.cache.layers[layer:], strict=True):
            if isinstance(clean, LinearAttentionCacheLayerMixin):
                mine.conv_states = _of(prompts, clean.conv_states)
                mine.recurrent_states = _of(prompts, clean.recurrent_states)
                mine.has_previous_state = dict(clean.has_previous_state)
                # nobody reads what comes after the last position, and a backward pass asks for what was there before
                mine.update_recurrent_state = lambda states, *_, **__: states
            for update in ("update", "update_indexer"):  # of keys and values, and of what sparse attention looks up
                if isinstance(clean, CacheLayerMixin) and hasattr(clean, update):
                    setattr(mine, update, functools.partial(_extended, clean, prompts, update))
        return {"past_key_values": cache, "use_cache": True}

    def logits(self, layer: int, residual: Tensor, prompts: Tensor) -> Tensor:
        """Logits [rows, V] where the last position leaves ``layer`` with ``residual`` [rows, d], each row in the prompt
        of that number."""
        with from_layer(self.decomposition, layer + 1, residual[:, None]):
            return last_logits(self.model, self.last[prompts], **self._cache(layer + 1, prompts))

    @torch.no_grad()
    def log_prob(self, layer: int, residual: Tensor, prompts: Tensor) -> Tensor:
        """The same as log p(target): float64 [rows]."""
        return log_prob(self.logits(layer, residual, prompts), self.target[prompts])

    def gradients(self, residuals: list[Tensor]) -> list[Tensor]:
        """d log p(target) / d residual after every layer, where those are the clean ``residuals``: lists of [n, d].

        One layer is differentiated at a time, last to first, so that no more than one is held in float32.
        """
        layers, everyone = self.decomposition.layers, torch.arange(len(self.target), device=self.target.device)
        top = residuals[-1].detach().clone().requires_grad_()
        with differentiating():
            value = self.logits(len(layers) - 1, top, everyone).double().log_softmax(-1)
            found = list(torch.autograd.grad(value.gather(1, self.target[:, None]).sum(), top))
        for layer in range(len(layers) - 1, 0, -1):
            below, written = residuals[layer - 1].detach().clone().requires_grad_(), []
            with differentiating():
                with _ending_after(layers[layer], written):
                    self.logits(layer - 1, below, everyone)
                found += torch.autograd.grad(written[0], below, found[-1][:, None])
        return found[::-1]


@contextlib.contextmanager
def _ending_after(layer: nn.Module, written: list[Tensor]) -> Iterator[None]:
    """A pass ends with what this layer puts out."""

    def ended(_: nn.Module, __: tuple, output: object) -> None:
        written.append(first_of(output))
        raise Stop

    hook = layer.register_forward_hook(ended)
    try:
        with contextlib.suppress(Stop):
            yield
    finally:
        hook.remove()


def _of(prompts: Tensor, states: dict[int, Tensor | None]) -> dict[int, Tensor | None]:
    """States of recurrent layers, of some prompts: copies, since a run writes into them."""
    return {key: None if state is None else state.index_select(0, prompts) for key, state in states.items()}


def _extended(clean: CacheLayerMixin, prompts: Tensor, update: str, *new: object, **options: object) -> object:
    """What some prompts hold with that of the last position: gathered when a layer asks, then forgotten."""
    mine = copy.copy(clean)
    mine.batch_select_indices(prompts)
    return getattr(mine, update)(*new, **options)


@contextlib.contextmanager
def differentiating() -> Iterator[None]:
    """Record gradients. Weights are remembered as they are now: an upcast block gives its float32 copy back before the
    backward pass asks for it. It is made again then, so that not every block that ran stays in float32."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_packed, _unpacked):
        yield


def _packed(tensor: Tensor) -> Tensor | tuple:
    weight = precision.stored(tensor)
    if weight is None:
        return tensor.detach()
    return weight, tensor.size(), tensor.stride(), tensor.storage_offset()


def _unpacked(packed: Tensor | tuple) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    weight, *view = packed
    return weight.float().as_strided(*view)
