"""A dense model seen through the routing of a mixture of experts: what sparsity alone does to statistics (null N2).

The neurons of each dense feed-forward layer are split into as many blocks as the mixture has experts. A prompt keeps
the blocks whose numbers the mixture routed it to in the layer at the same relative depth; the score of every other
neuron is 0, as that of an unrouted expert is. The masks are laid over finished scores, the model itself runs
undisturbed: this asks what the statistics make of sparsity, not what training under it would do.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from moescope import attribution, lpi, scores, tables
from moescope.clean import CleanRun
from moescope.errors import MoescopeError
from moescope.relations import GROUPS

#: Splits into blocks, each from a seed of its own and the same for all checkpoints.
SEEDS = 5


class MaskingError(MoescopeError):
    """A routing that cannot be laid over these prompts or this model."""


def masked_groups(run: CleanRun, routing: pl.DataFrame, seed: int = 0, progress: bool = False) -> pl.DataFrame:
    """Sums of the LPI (nats) of a dense model's neurons over the prompts that keep their block: ``masked_groups``.

    ``run`` is the clean run of the dense model, ``routing`` the table of a mixture of experts on the same prompts.
    ``importance`` is the mean over all prompts (0 where a prompt does not keep the neuron). Raises MaskingError where
    the prompts differ or a layer has fewer neurons than there are experts, DecompositionError where a layer of the
    model has no dense feed-forward part.
    """
    layers, device = len(run.trace.layers), run.trace.final.device
    kept = [torch.from_numpy(layer).to(device) for layer in _routed(routing, run.prompts["prompt_id"])]
    by_group = scores.indicator(run.prompts["group"].to_list(), list(range(GROUPS)), device)
    certificate, frames = lpi.Certificate(), []
    for layer in tqdm(range(layers), desc="scoring", unit="layer", disable=not progress):
        keeps = kept[matched_layer(layer, layers, len(kept))]
        scored = attribution.ffn_scores(layer, run, certificate)
        for number, block in enumerate(blocks(scored.shape[1], keeps.shape[1], layer, seed)):
            mask = keeps[:, torch.from_numpy(block).to(device)]
            frames.append(_sums(layer, number, torch.where(mask, scored, 0), mask, by_group))
    return tables.check(pl.concat(frames), "masked_groups")


def matched_layer(layer: int, layers: int, routed_layers: int) -> int:
    """The routed layer at the relative depth of a dense one: floor((l + 1/2) L_moe / L_dense), all from 0."""
    return int((layer + 0.5) * routed_layers / layers)


def blocks(neurons: int, experts: int, layer: int, seed: int = 0) -> Iterator[np.ndarray]:
    """The block (0 to experts - 1) of every neuron of a layer, [neurons], once for each of the ``SEEDS`` splits.

    Sizes differ by at most one. Nothing of the checkpoint plays a part, so a neuron keeps its block over training.
    """
    if neurons < experts:
        raise MaskingError(f"layer {layer} has {neurons} neurons, fewer than the {experts} experts of the pair")
    for number in range(SEEDS):
        order = np.random.default_rng([seed, number, layer]).permutation(neurons)
        block = np.empty(neurons, dtype=np.int64)
        block[order] = np.arange(neurons) % experts
        yield block


def _routed(routing: pl.DataFrame, prompt_ids: pl.Series) -> list[np.ndarray]:
    """Whether each prompt was routed to each expert, [P, E], for the layers that route, from the first on."""
    routing = routing.sort("layer", "prompt_id", "expert")
    ids = prompt_ids.sort()
    if not ids.equals(prompt_ids):
        raise MaskingError("the prompts are not sorted by prompt_id; pass a checked prompts table")
    layers = []
    for _, rows in routing.group_by("layer", maintain_order=True):
        if not rows["prompt_id"].unique().sort().equals(ids):
            raise MaskingError("the routing is that of other prompts; delete it and run again")
        layers.append(rows["slot"].is_not_null().to_numpy().reshape(len(ids), -1))
    return layers


def _sums(layer: int, number: int, scored: Tensor, mask: Tensor, by_group: Tensor) -> pl.DataFrame:
    """Rows of one layer and split: masked scores [P, n] summed over the prompts of each group."""
    groups = by_group @ scored
    columns = {f"group_{g}": scores.column(sums) for g, sums in enumerate(groups)}
    return pl.DataFrame(
        {
            "neuron": np.arange(scored.shape[1]),
            "active": mask.sum(0).cpu().numpy(),
            "importance": scores.column(groups.sum(0) / len(scored)),
            **columns,
        }
    ).with_columns(layer=pl.lit(layer, tables.ID), seed=pl.lit(number, tables.ID))
