"""One loaded model and a table of prompts -> every table of one checkpoint: who raises the target's log-probability.

One forward pass records what each layer wrote at the last position (``decomposition``), one pass over the layers scores
every neuron, head and layer component (``lpi``) and keeps sums over prompts, not a score per (prompt, neuron).
"""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor, nn
from tqdm import tqdm

from moescope import lpi, tables, targets
from moescope.decomposition import Decomposition, Site, Trace, routed_rows
from moescope.precision import computing_in_float32
from moescope.readout import Readout
from moescope.scores import Scores, column

#: Tokens of one forward batch, padding included.
BATCH_TOKENS = 16_384


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
    the tokenizer cannot make a target, ReadoutError where the model's logits are not those of its residual.
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
        readout = Readout.of(decomposition, trace, ids)
        scores = Scores(trace, prompts, uncertainty == "groups")
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


def _score_layer(layer: int, trace: Trace, readout: Readout, scores: Scores) -> None:
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


def _score(values: Tensor, coefficients: Tensor, base: lpi.Base, readout: Readout, scores: Scores) -> Tensor:
    """LPI [P, n] of all neurons of a site, as many at a time as memory allows."""
    blocks = torch.arange(len(values), device=values.device).split(lpi.neurons_at_once(readout.unembedding))
    parts = (
        lpi.of_neurons(lpi.Projection(readout.unembedding, values[b]), coefficients[:, b], base, scores.certificate)
        for b in blocks
    )
    return torch.cat(list(parts), 1)


def _score_heads(site: Site, coefficients: Tensor, base: lpi.Base, readout: Readout, scores: Scores) -> None:
    values, heads, neurons = site.values(), [], []
    for block in torch.arange(len(values), device=values.device).chunk(site.heads):
        projection = lpi.Projection(readout.unembedding, values[block])
        neurons.append(lpi.of_neurons(projection, coefficients[:, block], base, scores.certificate))
        heads.append(lpi.of_sums(projection, coefficients[:, block], base))
    scores.add_site(site, coefficients, torch.cat(neurons, 1))
    scores.heads.append((site.layer, torch.stack(heads, 1)))


def _score_experts(site: Site, trace: Trace, base: lpi.Base, readout: Readout, scores: Scores) -> None:
    record = trace.layers[site.layer]
    coefficients = record.coefficients[site.name]
    routed = torch.zeros_like(coefficients, dtype=torch.float64)  # [P, K, I]
    for expert, rows, slots in routed_rows(record.index):
        part = base.rows(rows)
        routed[rows, slots] = _score(site.values(expert), coefficients[rows, slots], part, readout, scores)
    scores.add_experts(site, record, routed)


def _predictions(
    prompts: pl.DataFrame, chosen: list[targets.Target], others: list[frozenset[int]], trace: Trace, readout: Readout
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
        pl.Series("log_prob", column(logits.double().log_softmax(-1).gather(1, target[:, None]))),
        pl.Series("log_prob_h0", column(readout.log_prob(trace.layers[0].residual_in))),
        pl.Series("argmax_id", logits.argmax(1).cpu().numpy()),
    )
