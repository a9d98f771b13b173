"""One loaded model and a table of prompts -> every table of one checkpoint: who raises the target's log-probability.

One forward pass records what each layer wrote at the last position (``decomposition``), one pass over the layers scores
every neuron, head and layer component (``lpi``) and keeps sums over prompts, not a score per (prompt, neuron).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor, nn
from tqdm import tqdm

from moescope import lpi, tables, targets
from moescope.decomposition import Decomposition, LayerTrace, Site, Trace, routed_rows
from moescope.errors import MoescopeError
from moescope.precision import computing_in_float32

#: Tokens of one forward batch, padding included.
BATCH_TOKENS = 16_384
#: Share of a prompt's active neurons listed in ``top_active``, and the least number by signed LPI.
TOP_SHARE, TOP_LEAST = 0.02, 300
GROUPS = 10


class AttributionError(MoescopeError):
    """The model's numbers cannot be attributed."""


def attribute(
    model: nn.Module,
    tokenizer: object,
    prompts: pl.DataFrame,
    target: str = "object",
    uncertainty: str = "groups",
    progress: bool = False,
) -> dict[str, pl.DataFrame]:
    """Score every neuron, head and layer of a causal LM on prompts (a ``prompts`` table).

    ``target``: ``object`` (the first token of the object) or ``argmax`` (the model's own top token). ``uncertainty``:
    ``groups`` adds the group sums and the top active neurons, ``none`` leaves them out. Returns frames by the names of
    ``tables.SCHEMAS``; scores are nats. Raises DecompositionError where the model does not decompose, TargetError where
    the tokenizer cannot make a target, AttributionError where the model's logits are not those of its residual.
    """
    return attribute_with_report(model, tokenizer, prompts, target, uncertainty, progress)[0]


def attribute_with_report(
    model: nn.Module,
    tokenizer: object,
    prompts: pl.DataFrame,
    target: str = "object",
    uncertainty: str = "groups",
    progress: bool = False,
) -> tuple[dict[str, pl.DataFrame], dict]:
    """The same, and a report: ``decomposition_error`` and the LPI ``certificate``."""
    prompts = tables.check(prompts, "prompts")
    with torch.no_grad(), computing_in_float32(model):
        objects = targets.find(tokenizer, prompts.to_dicts())
        decomposition = Decomposition(model)
        trace = decomposition.trace(_batches([t.tokens for t in objects], decomposition.device))
        error = trace.verified()
        chosen = objects
        if target == "argmax":
            chosen = [
                targets.retarget(t, token) for t, token in zip(objects, trace.logits.argmax(1).tolist(), strict=True)
            ]
        ids = torch.tensor([t.target_id for t in chosen], device=decomposition.device)
        readout = _Readout.of(decomposition, trace, ids)
        scores = _Scores(trace, prompts, uncertainty == "groups")
        for layer in tqdm(range(len(trace.layers)), desc="scoring", unit="layer", disable=not progress):
            _score_layer(layer, trace, readout, scores)
        others = targets.other_targets(prompts.to_dicts(), objects)
        frames = {"predictions": _predictions(prompts, chosen, others, trace, readout), **scores.frames()}
    frames = {name: tables.check(frame, name) for name, frame in frames.items()}
    return frames, {"decomposition_error": error, "certificate": scores.certificate.as_dict()}


def _batches(input_ids: list[tuple[int, ...]], device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Length-sorted, right-padded batches: (prompt rows, ids, mask). Causal models never see the padding."""
    order = sorted(range(len(input_ids)), key=lambda i: (len(input_ids[i]), i))
    batches, batch = [], []
    for i in order:
        if batch and (len(batch) + 1) * len(input_ids[i]) > BATCH_TOKENS:
            batches.append(batch)
            batch = []
        batch.append(i)
    batches.append(batch)
    return [_padded(rows, input_ids, device) for rows in batches]


def _padded(rows: list[int], input_ids: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(input_ids[i]) for i in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, i in enumerate(rows):
        ids[k, : len(input_ids[i])] = torch.tensor(input_ids[i])
        mask[k, : len(input_ids[i])] = 1
    return torch.tensor(rows, device=device), ids.to(device), mask.to(device)


@dataclass
class _Readout:
    """The unembedding, the frozen norm scale and target of every prompt, and the base distributions already formed."""

    unembedding: lpi.Unembedding
    scale: Tensor
    target: Tensor
    last: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, decomposition: Decomposition, trace: Trace, target: Tensor) -> _Readout:
        """Raises AttributionError where the affine read-out does not give the model's own logits (a soft cap, say)."""
        norm, head = decomposition.final_norm(), decomposition.head
        bias = getattr(head, "bias", None)
        unembedding = lpi.Unembedding.of(head.weight.detach(), norm.gain, norm.centred, norm.bias, bias)
        readout = cls(unembedding, norm.scale(trace.final), target)
        few = slice(0, 64)
        mine = unembedding.log_probs(trace.final[few], readout.scale[few])
        error = (mine - trace.logits[few].double().log_softmax(-1)).abs().max().item()
        if not error <= 1e-3:
            name = type(decomposition.model).__name__
            raise AttributionError(
                f"{name}: logits are not an affine map of the normed residual (off by {error:.1e} nats); not supported"
            )
        return readout

    def base(self, residual: Tensor) -> lpi.Base:
        """The distribution read from residuals [P, d]."""
        return lpi.Base.of(self.unembedding, self._log_probs(residual), self.target, self.scale)

    def log_prob(self, residual: Tensor) -> Tensor:
        """log p(target) read from residuals: float64 [P]."""
        return self._log_probs(residual).gather(1, self.target[:, None])[:, 0]

    def _log_probs(self, residual: Tensor) -> Tensor:
        # what one branch leaves is what the next one reads: remember the last residual
        if self.last is None or not torch.equal(self.last[0], residual):
            self.last = residual, self.unembedding.log_probs(residual, self.scale)
        return self.last[1]


def _score_layer(layer: int, trace: Trace, readout: _Readout, scores: _Scores) -> None:
    record = trace.layers[layer]
    branches: dict[str, list[Site]] = {}
    for site in trace.decomposition.at(layer):
        branches.setdefault(site.branch, []).append(site)
    for branch, sites in branches.items():
        base = readout.base(record.bases[branch])
        component = "attn" if sites[0].kind == "attn" else "ffn"
        for site in sites:
            coefficients = record.coefficients[site.name]
            if site.kind == "attn":
                _score_heads(site, coefficients, base, readout, scores)
            elif site.kind == "routed":
                _score_experts(site, trace, base, readout, scores)
            else:
                scores.add_site(site, coefficients, _score(site.values(), coefficients, base, readout, scores))
        after = readout.log_prob(_residual_after(trace, layer, branch))
        scores.components.append((layer, component, after - base.of_target))


def _residual_after(trace: Trace, layer: int, branch: str) -> Tensor:
    """The base residual of a branch with all that it writes. In a sequential layer that is a residual which was there:
    what the next branch reads, or what the layer leaves."""
    record = trace.layers[layer]
    rebuilt = record.bases[branch] + trace.branch_write(layer, branch)
    near = 1e-5 * (rebuilt - record.bases[branch]).abs().max()
    real = [*record.bases.values(), record.residual_out]
    return next((r for r in real if (r - rebuilt).abs().max() <= near), rebuilt)


def _score(values: Tensor, coefficients: Tensor, base: lpi.Base, readout: _Readout, scores: _Scores) -> Tensor:
    """LPI [P, n] of all neurons of a site, as many at a time as memory allows."""
    blocks = torch.arange(len(values), device=values.device).split(lpi.neurons_at_once(readout.unembedding))
    parts = (
        lpi.of_neurons(lpi.Projection(readout.unembedding, values[b]), coefficients[:, b], base, scores.certificate)
        for b in blocks
    )
    return torch.cat(list(parts), 1)


def _score_heads(site: Site, coefficients: Tensor, base: lpi.Base, readout: _Readout, scores: _Scores) -> None:
    values, heads, neurons = site.values(), [], []
    for block in torch.arange(len(values), device=values.device).chunk(site.heads):
        projection = lpi.Projection(readout.unembedding, values[block])
        neurons.append(lpi.of_neurons(projection, coefficients[:, block], base, scores.certificate))
        heads.append(lpi.of_sums(projection, coefficients[:, block], base))
    scores.add_site(site, coefficients, torch.cat(neurons, 1))
    scores.heads.append((site.layer, torch.stack(heads, 1)))


def _score_experts(site: Site, trace: Trace, base: lpi.Base, readout: _Readout, scores: _Scores) -> None:
    record = trace.layers[site.layer]
    coefficients = record.coefficients[site.name]
    routed = torch.zeros_like(coefficients, dtype=torch.float64)  # [P, K, I]
    for expert, rows, slots in routed_rows(record.index):
        part = base.rows(rows)
        routed[rows, slots] = _score(site.values(expert), coefficients[rows, slots], part, readout, scores)
    scores.add_experts(site, record, routed)


class _Scores:
    """Collects the LPI of sites as they come, and turns it into tables: sums over prompts per neuron, and per prompt
    the sums and the largest of its active neurons."""

    def __init__(self, trace: Trace, prompts: pl.DataFrame, groups: bool):
        device = trace.final.device
        self.prompt_ids = prompts["prompt_id"]
        self.relations = prompts["relation"].unique().sort().to_list()
        self.certificate = lpi.Certificate()
        #: LPI [P] of the whole A (attn) or F (ffn) of each layer
        self.components: list[tuple[int, str, Tensor]] = []
        self.heads: list[tuple[int, Tensor]] = []
        self.routing: list[pl.DataFrame] = []
        by_relation = _indicator(prompts["relation"].to_list(), self.relations, device)
        by_group = _indicator(prompts["group"].to_list(), list(range(GROUPS)), device) if groups else None
        self.sums = {c: _NeuronSums(by_relation, by_group) for c in tables.COMPONENTS}
        self.active = {c: _ActiveNeurons(trace, c, listed=groups) for c in tables.COMPONENTS}

    def add_site(self, site: Site, coefficients: Tensor, scores: Tensor) -> None:
        """LPI [P, n] of a site whose neurons are all active in every prompt."""
        component = "attn" if site.kind == "attn" else "ffn"
        n = scores.shape[1]
        width = n // max(1, site.heads)
        index = {"layer": site.layer, "neuron": torch.arange(n) % width}
        index |= {"head": torch.arange(n) // width} if site.heads else {"kind": site.kind, "expert": None}
        everyone = torch.arange(len(scores), device=scores.device)
        self.active[component].add(scores, self.sums[component].neurons + torch.arange(n, device=scores.device))
        self.sums[component].add(index, site.values(), everyone, coefficients, scores)

    def add_experts(self, site: Site, record: LayerTrace, scores: Tensor) -> None:
        """LPI [P, K, I] of the experts each prompt is routed to."""
        sums, experts, width = self.sums["ffn"], site.experts, site.neurons
        first = sums.neurons
        coefficients = record.coefficients[site.name]
        rows_of = {e: (rows, slots) for e, rows, slots in routed_rows(record.index)}
        nobody = (record.index.new_empty(0),) * 2
        for e in range(experts):
            rows, slots = rows_of.get(e, nobody)
            index = {"layer": site.layer, "kind": "routed", "expert": e, "neuron": torch.arange(width)}
            sums.add(index, site.values(e), rows, coefficients[rows, slots], scores[rows, slots])
        neurons = first + record.index[..., None] * width + torch.arange(width, device=scores.device)
        self.active["ffn"].add(scores.flatten(1), neurons.flatten(1))
        self.routing.append(self._routing(site, record, scores.sum(2)))

    def _routing(self, site: Site, record: LayerTrace, scores: Tensor) -> pl.DataFrame:
        """One layer of the routing table: slots by descending weight."""
        prompts, experts = record.probability.shape
        slot = torch.full((prompts, experts), -1)
        order = record.weight.sort(dim=1, descending=True, stable=True).indices
        slot.scatter_(1, record.index.gather(1, order).cpu(), torch.arange(order.shape[1]).expand(prompts, -1))
        weight, lpi_sum = torch.zeros_like(record.probability), torch.zeros_like(record.probability).double()
        weight.scatter_(1, record.index, record.weight)
        lpi_sum.scatter_(1, record.index, scores)
        return pl.DataFrame(
            {
                "prompt_id": self._repeated(experts),
                "layer": pl.repeat(site.layer, prompts * experts, dtype=tables.ID, eager=True),
                "expert": torch.arange(experts).repeat(prompts).numpy(),
                "slot": slot.flatten().numpy(),
                "weight": _column(weight),
                "probability": _column(record.probability),
                "lpi": _column(lpi_sum),
            }
        ).with_columns(slot=pl.when(pl.col("slot") >= 0).then("slot"))

    def _repeated(self, times: int) -> pl.Series:
        """Every prompt_id so many times in a row."""
        rows = torch.arange(len(self.prompt_ids)).repeat_interleave(times)
        return self.prompt_ids.gather(rows.numpy())

    def frames(self) -> dict[str, pl.DataFrame]:
        """Every table but the predictions."""
        frames = {"layers": self._layers(), "heads": self._heads()}
        frames["active_sums"] = pl.concat(self.active[c].sums(self.prompt_ids) for c in tables.COMPONENTS)
        if self.routing:
            frames["routing"] = pl.concat(self.routing)
        for component, sums in self.sums.items():
            frames[f"{component}_neurons"] = sums.importance(self.relations)
            if sums.by_group is not None:
                frames[f"{component}_groups"] = sums.groups()
        frames["attn_neurons"] = frames["attn_neurons"].select(pl.exclude("^active.*$", "magnitude"))
        if self.sums["ffn"].by_group is not None:
            frames["top_active"] = pl.concat(
                (self.active[c].top(self.prompt_ids, self.sums[c].index()) for c in tables.COMPONENTS), how="diagonal"
            )
        return frames

    def _layers(self) -> pl.DataFrame:
        return pl.concat(
            pl.DataFrame({"prompt_id": self.prompt_ids, "lpi": _column(scores)}).with_columns(
                layer=pl.lit(layer, tables.ID), component=pl.lit(component)
            )
            for layer, component, scores in self.components
        )

    def _heads(self) -> pl.DataFrame:
        return pl.concat(
            pl.DataFrame(
                {
                    "prompt_id": self._repeated(scores.shape[1]),
                    "head": torch.arange(scores.shape[1]).repeat(len(scores)).numpy(),
                    "lpi": _column(scores),
                }
            ).with_columns(layer=pl.lit(layer, tables.ID))
            for layer, scores in self.heads
        )


class _NeuronSums:
    """Per neuron of a component: LPI summed over the prompts of each relation and of each subject group, the number of
    prompts in which it was active, and the size of what it wrote."""

    def __init__(self, by_relation: Tensor, by_group: Tensor | None):
        self.by_relation, self.by_group = by_relation, by_group
        self.neurons = 0
        self.blocks: list[pl.DataFrame] = []
        self.parts: dict[str, list[Tensor]] = {name: [] for name in ("lpi", "groups", "active", "magnitude")}

    def add(self, index: dict, values: Tensor, rows: Tensor, coefficients: Tensor, scores: Tensor) -> None:
        """A block of neurons with values [n, d] that is active in some prompt rows [p]; the rest [p, n]."""
        n, of_relation = scores.shape[1], self.by_relation[:, rows]
        columns = {k: v.numpy() if isinstance(v, Tensor) else pl.repeat(v, n, eager=True) for k, v in index.items()}
        types = {"kind": tables.TEXT} | dict.fromkeys(("layer", "expert", "head", "neuron"), tables.ID)
        self.blocks.append(pl.DataFrame(columns).cast({name: types[name] for name in columns}))
        self.parts["lpi"].append(of_relation @ scores)
        self.parts["active"].append(of_relation.sum(1, keepdim=True).expand(-1, n))
        self.parts["magnitude"].append((coefficients.double().abs().sum(0) * values.double().norm(dim=1))[None])
        if self.by_group is not None:
            self.parts["groups"].append(self.by_group[:, rows] @ scores)
        self.neurons += n

    def index(self) -> pl.DataFrame:
        """The ids of the neurons, a row each, in the order they came."""
        return pl.concat(self.blocks, how="diagonal")

    def _total(self, name: str) -> Tensor:
        return torch.cat(self.parts[name], 1)

    def importance(self, relations: list[str]) -> pl.DataFrame:
        """Mean LPI over all prompts and over those of each relation, with activity and magnitude."""
        lpi_sums, active, prompts = self._total("lpi"), self._total("active"), self.by_relation.sum(1)
        columns = {
            "active": active.sum(0).long().cpu().numpy(),
            "magnitude": _column(self._total("magnitude")[0] / prompts.sum()),
            "importance": _column(lpi_sums.sum(0) / prompts.sum()),
        }
        for i, relation in enumerate(relations):
            columns[f"importance_{relation}"] = _column(lpi_sums[i] / prompts[i])
            columns[f"active_{relation}"] = active[i].long().cpu().numpy()
        return self.index().hstack(pl.DataFrame(columns))

    def groups(self) -> pl.DataFrame:
        sums = self._total("groups")
        return self.index().hstack(pl.DataFrame({f"group_{g}": _column(sums[g]) for g in range(GROUPS)}))


class _ActiveNeurons:
    """Per prompt, over all layers: sums over its active neurons, and the largest of them as the layers go by."""

    def __init__(self, trace: Trace, component: str, listed: bool):
        prompts, device = trace.final.shape[0], trace.final.device
        sites = [s for s in trace.decomposition.sites if (s.kind == "attn") == (component == "attn")]
        self.component, self.listed = component, listed
        self.count = sum(trace.layers[s.layer].coefficients[s.name][0].numel() for s in sites)
        share = math.ceil(TOP_SHARE * self.count)
        empty = torch.zeros(prompts, 0, dtype=torch.float64, device=device)
        #: size of each ranking, and its best so far as (key, LPI, neuron)
        self.sizes = {"abs": share, "signed": min(self.count, max(share, TOP_LEAST))}
        self.best = dict.fromkeys(self.sizes, (empty, empty.long()))
        self.positive, self.negative, self.log = (
            torch.zeros(prompts, dtype=torch.float64, device=device) for _ in "+-l"
        )

    def add(self, scores: Tensor, neurons: Tensor) -> None:
        """LPI [P, m] of active neurons with row numbers [m] or [P, m], ascending."""
        positive = torch.where(scores > lpi.ZERO, scores, 0)
        self.positive += positive.sum(1)
        self.negative += torch.where(scores < -lpi.ZERO, scores, 0).sum(1)
        self.log += torch.xlogy(positive, positive).sum(1)
        if self.listed:
            for name, (best, where) in self.best.items():
                all_scores = torch.cat([best, scores], 1)
                all_neurons = torch.cat([where, neurons.expand(scores.shape)], 1)
                key = all_scores.abs() if name == "abs" else all_scores
                # stable, and earlier neurons stand first: ties go to the lower index
                order = key.sort(dim=1, descending=True, stable=True).indices[:, : self.sizes[name]]
                self.best[name] = (all_scores.gather(1, order), all_neurons.gather(1, order))

    def sums(self, prompt_ids: pl.Series) -> pl.DataFrame:
        return pl.DataFrame(
            {
                "prompt_id": prompt_ids,
                "sum_positive": self.positive.cpu().numpy(),
                "sum_negative": self.negative.cpu().numpy(),
                "sum_positive_log": self.log.cpu().numpy(),
            }
        ).with_columns(component=pl.lit(self.component), active=pl.lit(self.count, tables.COUNT))

    def top(self, prompt_ids: pl.Series, index: pl.DataFrame) -> pl.DataFrame:
        """The union of both rankings, a row per prompt and neuron."""
        parts = []
        for scores, neurons in self.best.values():
            prompt = torch.arange(len(scores)).repeat_interleave(scores.shape[1]).numpy()
            parts.append(
                pl.DataFrame(
                    {"prompt": prompt, "row": neurons.flatten().cpu().numpy(), "lpi": _column(scores.flatten())}
                )
            )
        union = pl.concat(parts).unique(["prompt", "row"], maintain_order=True)
        return union.select(
            "lpi", prompt_id=prompt_ids.gather(union["prompt"]), component=pl.lit(self.component)
        ).hstack(index[union["row"]])


def _indicator(labels: list, names: list, device: torch.device) -> Tensor:
    """[names, P] float64: 1 where a prompt has the label."""
    return torch.tensor([[float(label == name) for label in labels] for name in names], device=device).double()


def _column(x: Tensor) -> object:
    return x.detach().flatten().float().cpu().numpy()


def _predictions(
    prompts: pl.DataFrame, chosen: list[targets.Target], others: list[frozenset[int]], trace: Trace, readout: _Readout
) -> pl.DataFrame:
    """Rank and log-probability of the targets in the model's own logits."""
    logits, target = trace.logits, readout.target
    above = logits > logits.gather(1, target[:, None])
    removed = [int(above[i, sorted(ids)].sum()) for i, ids in enumerate(others)]
    rank = above.sum(1).cpu() + 1
    return prompts.select("prompt_id", "relation", "category", "subject", "object").with_columns(
        *(pl.Series(name, [getattr(t, name) for t in chosen]) for name in ("target_id", "single_token", "leaked")),
        pl.Series("boundary_merge", [t.boundary_merge for t in chosen]),
        pl.Series("rank", rank.numpy()),
        pl.Series("rank_filtered", (rank - torch.tensor(removed)).numpy()),
        pl.Series("log_prob", _column(logits.double().log_softmax(-1).gather(1, target[:, None]))),
        pl.Series("log_prob_h0", _column(readout.log_prob(trace.layers[0].residual_in))),
        pl.Series("argmax_id", logits.argmax(1).cpu().numpy()),
    )
