"""LPI of sites, layer after layer -> tables: sums over prompts per neuron, and per prompt the sums and the largest of
its active neurons. No score per (prompt, neuron) is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable

import polars as pl
import torch
from torch import Tensor

from moescope import lpi, tables
from moescope.decomposition import LayerTrace, Site, Trace, routed_rows
from moescope.relations import GROUPS
from moescope.statistics import ZERO

#: Share of a prompt's active neurons listed in ``top_active``, and the least number by signed LPI.
TOP_SHARE, TOP_LEAST = 0.02, 300


class Scores:
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
        by_relation = indicator(prompts["relation"].to_list(), self.relations, device)
        by_group = indicator(prompts["group"].to_list(), list(range(GROUPS)), device) if groups else None
        self.sums = {c: _NeuronSums(by_relation, by_group) for c in tables.COMPONENTS}
        self.active = {c: _ActiveNeurons(trace, c, listed=groups) for c in tables.COMPONENTS}

    def add_site(self, site: Site, coefficients: Tensor, scores: Tensor) -> None:
        """LPI [P, n] of a site whose neurons are all active in every prompt."""
        sums, n = self.sums[site.component], torch.arange(scores.shape[1])
        width = len(n) // max(1, site.heads)
        of_attention = {"head": n // width if site.heads else None}
        index = {"neuron": n % width} | (of_attention if site.kind == "attn" else {"expert": None, "kind": site.kind})
        self.active[site.component].add(scores, sums.neurons + n.to(scores.device))
        everyone = torch.arange(len(scores), device=scores.device)
        sums.add(site.layer, index, [(site.values(), everyone, coefficients, scores)])

    def add_experts(self, site: Site, record: LayerTrace, scores: Tensor) -> None:
        """LPI [P, K, I] of the experts each prompt is routed to."""
        sums, width, coefficients = self.sums["ffn"], site.neurons, record.coefficients[site.name]
        first, n = sums.neurons, torch.arange(site.experts * site.neurons)
        rows_of = {e: (rows, slots) for e, rows, slots in routed_rows(record.index)}
        nobody = (record.index.new_empty(0),) * 2
        experts = ((site.values(e), *rows_of.get(e, nobody)) for e in range(site.experts))
        parts = ((values, rows, coefficients[rows, slots], scores[rows, slots]) for values, rows, slots in experts)
        sums.add(site.layer, {"neuron": n % width, "expert": n // width, "kind": "routed"}, parts)
        neurons = first + record.index[..., None] * width + torch.arange(width, device=scores.device)
        self.active["ffn"].add(scores.flatten(1), neurons.flatten(1))
        self.routing.append(self._routing(site, record, scores.sum(2)))

    def _routing(self, site: Site, record: LayerTrace, scores: Tensor) -> pl.DataFrame:
        """One layer of the routing table: slots by descending weight."""
        prompts, experts = len(record.index), site.experts
        slot = torch.full((prompts, experts), -1)
        order = record.weight.sort(dim=1, descending=True, stable=True).indices
        slot.scatter_(1, record.index.gather(1, order).cpu(), torch.arange(order.shape[1]).expand(prompts, -1))
        weight, lpi_sum = (x.new_zeros(prompts, experts) for x in (record.weight, scores))
        weight.scatter_(1, record.index, record.weight)
        lpi_sum.scatter_(1, record.index, scores)
        return pl.DataFrame(
            {
                "prompt_id": self._repeated(experts),
                "layer": pl.repeat(site.layer, prompts * experts, dtype=tables.ID, eager=True),
                "expert": torch.arange(experts).repeat(prompts).numpy(),
                "slot": slot.flatten().numpy(),
                "weight": column(weight),
                "probability": None if record.probability is None else column(record.probability),
                "lpi": column(lpi_sum),
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
            pl.DataFrame({"prompt_id": self.prompt_ids, "lpi": column(scores)}).with_columns(
                layer=pl.lit(layer, tables.ID), component=pl.lit(component)
            )
            for layer, component, scores in self.components
        )

    def _heads(self) -> pl.DataFrame:
        if not self.heads:
            return tables.of_rows([], "heads")
        return pl.concat(
            pl.DataFrame(
                {
                    "prompt_id": self._repeated(scores.shape[1]),
                    "head": torch.arange(scores.shape[1]).repeat(len(scores)).numpy(),
                    "lpi": column(scores),
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

    def add(self, layer: int, index: dict, parts: Iterable[tuple[Tensor, ...]]) -> None:
        """The neurons of a site, in parts: values [n, d], the prompt rows [p] it is active in, and for those the
        coefficients and scores [p, n]. ``index``: what tells its neurons apart, over all parts."""
        for values, rows, coefficients, scores in parts:
            of_relation = self.by_relation[:, rows]
            self.parts["lpi"].append(of_relation @ scores)
            self.parts["active"].append(of_relation.sum(1, keepdim=True).expand(-1, scores.shape[1]))
            size = coefficients.double().abs().sum(0) * values.double().norm(dim=1)
            self.parts["magnitude"].append(size[None])
            if self.by_group is not None:
                self.parts["groups"].append(self.by_group[:, rows] @ scores)
        n = len(index["neuron"])
        columns = {k: v.numpy() if isinstance(v, Tensor) else [v] * n for k, v in {"layer": layer, **index}.items()}
        types = {"kind": tables.TEXT} | dict.fromkeys(("layer", "expert", "head", "neuron"), tables.ID)
        self.blocks.append(pl.DataFrame(columns, schema_overrides={name: types[name] for name in columns}))
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
            "magnitude": column(self._total("magnitude")[0] / prompts.sum()),
            "importance": column(lpi_sums.sum(0) / prompts.sum()),
        }
        for i, relation in enumerate(relations):
            columns[f"importance_{relation}"] = column(lpi_sums[i] / prompts[i])
            columns[f"active_{relation}"] = active[i].long().cpu().numpy()
        return self.index().hstack(pl.DataFrame(columns))

    def groups(self) -> pl.DataFrame:
        sums = self._total("groups")
        return self.index().hstack(pl.DataFrame({f"group_{g}": column(sums[g]) for g in range(GROUPS)}))


class _ActiveNeurons:
    """Per prompt, over all layers: sums over its active neurons, and the largest of them as the layers go by."""

    def __init__(self, trace: Trace, component: str, listed: bool):
        prompts, device = trace.final.shape[0], trace.final.device
        sites = [s for s in trace.decomposition.sites if s.component == component]
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
        positive = torch.where(scores > ZERO, scores, 0)
        self.positive += positive.sum(1)
        self.negative += torch.where(scores < -ZERO, scores, 0).sum(1)
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
                    {"prompt": prompt, "row": neurons.flatten().cpu().numpy(), "lpi": column(scores.flatten())}
                )
            )
        union = pl.concat(parts).unique(["prompt", "row"], maintain_order=True)
        return union.select(
            "lpi", prompt_id=prompt_ids.gather(union["prompt"]), component=pl.lit(self.component)
        ).hstack(index[union["row"]])


def indicator(labels: list, names: list, device: torch.device) -> Tensor:
    """Which of P prompts has which label: [names, P] float64 of ones and zeros."""
    return torch.tensor([[float(label == name) for label in labels] for name in names], device=device).double()


def column(x: Tensor) -> object:
    return x.detach().flatten().float().cpu().numpy()
