"""One loaded model and a table of prompts -> every table of one checkpoint: who raises the target's log-probability.

One forward pass records what each layer wrote at the last position (``decomposition``), one pass over the layers scores
every neuron, head and layer component (``lpi``) and keeps sums over prompts, not a score per (prompt, neuron).
"""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor, nn
from tqdm import tqdm

from moescope import lpi, tables
from moescope.clean import CleanRun
from moescope.decomposition import DecompositionError, Site, Trace, routed_rows
from moescope.precision import computing_in_float32
from moescope.readout import Readout
from moescope.scores import Scores, column


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
    ``tables.SCHEMAS``; scores are nats. Raises what ``CleanRun.of`` raises.
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
    with torch.no_grad(), computing_in_float32(model):
        run = CleanRun.of(model, tokenizer, prompts, target)
        scores = Scores(run.trace, run.prompts, uncertainty == "groups")
        for layer in tqdm(range(len(run.trace.layers)), desc="scoring", unit="layer", disable=not progress):
            _score_layer(layer, run.trace, run.readout, scores)
        frames = {"predictions": _predictions(run), **scores.frames()}
    frames = {name: tables.check(frame, name) for name, frame in frames.items()}
    return frames, {"decomposition_error": run.error, "certificate": scores.certificate.as_dict()}


def ffn_scores(layer: int, run: CleanRun, certificate: lpi.Certificate) -> Tensor:
    """LPI [P, n] (float64, nats) of the neurons of a dense feed-forward layer, in the order of ``ffn_neurons``.

    Raises DecompositionError where the layer has none.
    """
    sites = run.decomposition.at(layer, "dense")
    if not sites:
        raise DecompositionError(f"layer {layer} has no dense feed-forward part; name a dense model")
    record, found = run.trace.layers[layer], []
    for site in sites:
        base = run.readout.base(record.bases[site.branch])
        found.append(_score(site.values(), record.coefficients[site.name], base, run.readout, certificate))
    return torch.cat(found, 1)


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
                found = _score(site.values(), coefficients, base, readout, scores.certificate)
                scores.add_site(site, coefficients, found)
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


def _score(
    values: Tensor, coefficients: Tensor, base: lpi.Base, readout: Readout, certificate: lpi.Certificate
) -> Tensor:
    """LPI [P, n] of all neurons of a site, as many at a time as memory allows."""
    blocks = torch.arange(len(values), device=values.device).split(lpi.neurons_at_once(readout.unembedding))
    parts = (
        lpi.of_neurons(lpi.Projection(readout.unembedding, values[b]), coefficients[:, b], base, certificate)
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
        routed[rows, slots] = _score(site.values(expert), coefficients[rows, slots], part, readout, scores.certificate)
    scores.add_experts(site, record, routed)


def _predictions(run: CleanRun) -> pl.DataFrame:
    """Rank and log-probability of the targets in the model's own logits."""
    logits, target = run.trace.logits, run.target
    above = logits > logits.gather(1, target[:, None])
    removed = [int(above[i, sorted(ids)].sum()) for i, ids in enumerate(run.others)]
    rank = above.sum(1).cpu() + 1
    flags = ("target_id", "single_token", "leaked", "boundary_merge")
    return run.prompts.select("prompt_id", "relation", "category", "subject", "object").with_columns(
        *(pl.Series(name, [getattr(t, name) for t in run.targets]) for name in flags),
        pl.Series("rank", rank.numpy()),
        pl.Series("rank_filtered", (rank - torch.tensor(removed)).numpy()),
        pl.Series("log_prob", column(logits.double().log_softmax(-1).gather(1, target[:, None]))),
        pl.Series("log_prob_h0", column(run.readout.log_prob(run.trace.layers[0].residual_in))),
        pl.Series("argmax_id", logits.argmax(1).cpu().numpy()),
    )
