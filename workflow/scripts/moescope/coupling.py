"""One loaded mixture of experts, the prompts, and pairs of a head and an expert -> does the head drive the expert?

Three experiments on every pair, each beside controls. *Suppression* zeroes the head at all positions and looks at what
later routers then give to the experts that they had chosen. *Forcing* has the expert run all the same, with the weight
that it had. *Integrated gradients* (Sundararajan et al. 2017) share out the probability that the router gives to the
expert over the heads of one layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from tqdm import tqdm

from moescope import interventions, replay, routing, tables
from moescope.clean import CleanRun
from moescope.decomposition import SCORINGS
from moescope.expert_ablation import Interventions
from moescope.pairs import Pair
from moescope.passes import Batch, During, Passes
from moescope.routing import Routing
from moescope.scores import column

#: Prompts whose keys and values are held at once; rows of one backward pass.
_PROMPTS, _ROWS = 128, 2_048
#: Steps of the path of integrated gradients.
STEPS = 64


@dataclass(frozen=True)
class Tested:
    """A pair, the prompts that it is tested on [P] (bool), and the ``fold`` that these are (None: all prompts)."""

    pair: Pair
    prompts: np.ndarray
    fold: int | None


def suppress_and_force(
    found: Interventions,
    passes: Passes,
    clean: Mapping[int, Routing],
    tested: Sequence[Tested],
    seeds: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> pl.DataFrame:
    """Suppression and forcing of all pairs: rows for ``expert_interventions``, and the table ``gates``.

    ``clean``: what the routers choose by layer and prefix (``passes.clean_routing``). Controls are other heads of the
    layer (as many as ``seeds``, or all that there are), and other experts of the layer, forced with the weights of the
    pair's. Raises InterventionError where a head or an expert is not there.
    """
    gates: list[pl.DataFrame] = []
    bar = tqdm(sorted(tested, key=lambda t: t.pair), desc="pairs", unit="pair", disable=not progress)
    zeroed: dict[tuple, tuple[np.ndarray, np.ndarray, dict[int, Tensor]]] = {}
    for one in bar:
        pair, decomposition = one.pair, passes.clean.decomposition
        pair.require_causal()
        own = interventions.head(decomposition, pair.head_layer, pair.head)
        interventions.Target(pair.layer, "routed", [0], pair.expert).site(decomposition)
        if passes.layer != pair.head_layer:
            zeroed.clear()  # controls are heads of one layer; what routers said without them is large
        passes.start_at(pair.head_layer)
        others = _others(decomposition.at(pair.head_layer, "attn")[0].heads, pair.head, seeds, [seed, *pair[:2]])
        for head, control in [(pair.head, {"control": "none"}), *_controls(others)]:
            key = pair.head_layer, head, one.fold
            if key not in zeroed:
                zeroed[key] = _suppressed(passes, pair.head_layer, head, one.prompts)
            *result, routers = zeroed[key]
            said = {"mode": pair.label, "fold": one.fold, "head": head, **control}
            found.add(*result, one.prompts, experiment="suppression", layer=pair.head_layer, **said)
            gates.append(_gates(passes, clean, routers, one).with_columns(**_literals(pair, control)))
        experts = _others(decomposition.at(pair.layer, "routed")[0].experts, pair.expert, seeds, [seed, *pair])
        weight = clean[pair.layer].weight_of(pair.expert)
        for expert, control in [(pair.expert, {"control": "none"}), *_controls(experts)]:
            during = _forced(passes, pair.layer, expert, weight)
            with interventions.zeroed(decomposition, [own]):
                result = passes.run(one.prompts, passes.before.residual_out, during)
            said = {"mode": pair.label, "fold": one.fold, "head": pair.head, "expert": expert, **control}
            found.add(*result, one.prompts, experiment="forcing", layer=pair.layer, **said)
    if not gates:
        return tables.of_rows([], "gates")
    found_once = pl.concat(gates).unique(tables.SCHEMAS["gates"].key, keep="first", maintain_order=True)
    return tables.check(found_once, "gates")  # pairs may share a head


def _others(count: int, but: int, number: int, seed: Sequence[int]) -> list[int]:
    """Some of ``count``, ``but`` one, drawn at random."""
    rest = [n for n in range(count) if n != but]
    return np.random.default_rng(seed).choice(rest, min(number, len(rest)), replace=False).tolist() if rest else []


def _controls(others: Sequence[int]) -> list[tuple[int, dict]]:
    return [(other, {"control": "random", "seed": k}) for k, other in enumerate(others)]


def _literals(pair: Pair, control: Mapping) -> dict[str, pl.Expr]:
    named = {"layer": pair.head_layer, "head": pair.head, "control": control["control"], "seed": control.get("seed")}
    return {name: pl.lit(value, tables.SCHEMAS["gates"].columns[name]) for name, value in named.items()}


def _suppressed(
    passes: Passes, layer: int, head: int, prompts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[int, Tensor]]:
    """log p(target) and rank [P] with a head zeroed at all positions, and what the routers from its layer on say at the
    last position: [P, E] by layer."""
    decomposition = passes.clean.decomposition
    said: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def watching(batch: Batch) -> Iterator[None]:
        with routing.watched(decomposition) as found:
            yield
        for later, seen in found.items():
            last = seen.router[batch.last(later)].float()
            said.setdefault(later, last.new_full((len(prompts), last.shape[1]), torch.nan))[batch.rows] = last

    with interventions.zeroed(decomposition, [interventions.head(decomposition, layer, head)]):
        log_prob, rank = passes.run(prompts, passes.before.residual_out, watching)
    return log_prob, rank, said


def _gates(passes: Passes, clean: Mapping[int, Routing], routers: Mapping[int, Tensor], one: Tested) -> pl.DataFrame:
    """What the routers gave, clean and without a head, to the experts that they had chosen, and to that of the pair."""
    scoring, device = SCORINGS[passes.clean.trace.scoring], passes.clean.decomposition.device
    some = torch.from_numpy(np.flatnonzero(one.prompts)).to(device)
    last, ids = passes.last[some], passes.clean.prompts["prompt_id"].gather(some.cpu().numpy())
    parts = []
    for layer in sorted(routers):
        before, after = scoring(clean[layer].router[last].float()), scoring(routers[layer][some])
        chosen = clean[layer].index[last]
        pairs = [(None, before.gather(1, chosen).sum(1), after.gather(1, chosen).sum(1))]
        if layer == one.pair.layer:
            pairs.append((one.pair.expert, before[:, one.pair.expert], after[:, one.pair.expert]))
        parts += (
            pl.DataFrame({"prompt_id": ids, "clean": column(with_head), "suppressed": column(without)}).with_columns(
                gate_layer=pl.lit(layer, tables.ID), expert=pl.lit(expert, tables.ID)
            )
            for expert, with_head, without in pairs
        )
    return pl.concat(parts)


def _forced(passes: Passes, layer: int, expert: int, weight: Tensor) -> During:
    """Force an expert at every position, with a weight by prefix."""
    decomposition = passes.clean.decomposition
    return lambda batch: interventions.force(decomposition, layer, expert, weight[batch.at(layer)])


# --- integrated gradients


def integrated_gradients(
    run: CleanRun, tested: Sequence[Tested], steps: int = STEPS, progress: bool = False
) -> pl.DataFrame:
    """Integrated gradients of an expert's probability (before the top k) by the heads of the layer of its pair's head,
    as the table ``gradients``.

    All at the last position, keys and values of the others being those of the clean run. The path leads from all heads
    of the layer zeroed to what they put out, in ``steps`` of Gauss-Legendre quadrature; everything else that the layer
    adds to stays, and later layers follow. ``attribution`` is summed over a head's neurons; the rest (head null) is the
    probability that is left without these heads. Both add up to the probability, but for the ``gap``. It is that of the
    quadrature, and, where routers lie between the head and the expert, of their choices, which switch along the path:
    the probability jumps there, and no gradient sees it, however many the steps. Not within ``replay.sparing``. Raises
    InterventionError where the layer has no heads, ReplayError where the last position cannot be run by itself.
    """
    wanted: dict[tuple[int, int, int], np.ndarray] = {}
    for one in tested:
        key = one.pair.head_layer, one.pair.layer, one.pair.expert
        wanted[key] = wanted.get(key, False) | one.prompts
    groups, frames = replay.by_length(run), [tables.of_rows([], "gradients")]
    for route, prompts in tqdm(wanted.items(), desc="integrated gradients", unit="pair", disable=not progress):
        asked = torch.from_numpy(prompts).to(run.decomposition.device)
        for group in groups:
            for part in asked[group.rows].nonzero()[:, 0].split(_PROMPTS):
                if len(part):
                    frames.append(_Route(run, *route).attributions(group.rows[part], group.ids[part], steps))
    return tables.check(pl.concat(frames), "gradients")


@dataclass(frozen=True)
class _Route:
    """From the heads of ``head_layer`` to the probability of an expert, at the last position."""

    run: CleanRun
    head_layer: int
    layer: int
    expert: int

    def attributions(self, rows: Tensor, ids: Tensor, steps: int) -> pl.DataFrame:
        """The rows of ``gradients`` of some prompts of one length, ``rows`` [n] with token ``ids`` [n, T]."""
        decomposition, record = self.run.decomposition, self.run.trace.layers[self.head_layer]
        site = interventions.head(decomposition, self.head_layer, 0).site(decomposition)
        last = replay.LastPosition(decomposition, ids, self.run.target[rows])
        put_out = (record.coefficients[site.name] / record.factors[site.branch])[rows]
        entering, everyone = record.residual_in[rows], torch.arange(len(rows), device=rows.device)

        def probability(heads: Tensor, prompts: Tensor) -> Tensor:
            with _in_place(site.module, heads), _heard(decomposition.at(self.layer, "routed")[0].router) as said:
                last.logits(self.head_layer - 1, entering[prompts], prompts)
            return SCORINGS[self.run.trace.scoring](said[0].reshape(len(prompts), -1).float())[:, self.expert]

        nothing = torch.zeros_like(put_out)
        whole, rest = (probability(x, everyone) for x in (put_out, nothing))
        self._verify(whole, rows)
        with replay.differentiating():
            of_neurons = IntegratedGradients(probability).attribute(
                put_out, nothing, additional_forward_args=everyone, n_steps=steps, internal_batch_size=_ROWS
            )
        of_heads = of_neurons.detach().unflatten(1, (site.heads, -1)).sum(2)
        return self._rows(rows, of_heads, rest, of_heads.sum(1) - (whole - rest))

    def _verify(self, whole: Tensor, rows: Tensor) -> None:
        """The end of the path must be the clean run."""
        clean = SCORINGS[self.run.trace.scoring](self.run.trace.layers[self.layer].router[rows])[:, self.expert]
        error = float((whole - clean).abs().max())
        if not error <= replay.TOLERANCE:
            raise replay.ReplayError(
                f"{type(self.run.model).__name__}: the last position run by itself gives expert {self.expert} of layer "
                f"{self.layer} a probability that is off by {error:.1e}; this architecture is not supported"
            )

    def _rows(self, rows: Tensor, of_heads: Tensor, rest: Tensor, gap: Tensor) -> pl.DataFrame:
        attribution = torch.cat([of_heads, rest[:, None]], 1)
        prompts = torch.arange(len(rows)).repeat_interleave(attribution.shape[1]).numpy()
        found = {
            "prompt_id": self.run.prompts["prompt_id"].gather(rows.cpu().numpy()).gather(prompts),
            "head": [*range(of_heads.shape[1]), None] * len(rows),
            "attribution": column(attribution),
            "gap": column(gap[:, None].expand_as(attribution)),
        }
        found |= {name: [getattr(self, name)] * len(prompts) for name in ("head_layer", "layer", "expert")}
        types = tables.SCHEMAS["gradients"].columns
        return pl.DataFrame({name: found[name] for name in types}, schema=dict(types))


@contextlib.contextmanager
def _in_place(matrix: nn.Module, heads: Tensor) -> Iterator[None]:
    """The output matrix of attention reads these heads [n, neurons] instead of its own, at n last positions."""
    hook = matrix.register_forward_pre_hook(lambda m, args: (heads.view_as(args[0]), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _heard(router: nn.Module) -> Iterator[list[Tensor]]:
    """What a router says of all experts, with its gradient. The forward pass within the context ends there."""
    said: list[Tensor] = []

    def hear(_: nn.Module, __: tuple, output: tuple[Tensor, ...]) -> None:
        said.append(output[0])
        raise replay.Stop

    hook = router.register_forward_hook(hear)
    try:
        with contextlib.suppress(replay.Stop):
            yield said
    finally:
        hook.remove()
