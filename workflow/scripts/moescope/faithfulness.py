"""Is the score faithful? A sample of neurons, each really taken away, beside what its scores said.

The true effect of a neuron is what its contribution at the last position is worth there: log p(target) with it less log
p(target) without it, all later layers run again. LPI reads the same contribution without the later layers; gradient x
activation extrapolates through them; |coefficient| x |value| knows neither direction nor target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from moescope import lpi, replay, selection, tables
from moescope.clean import CleanRun
from moescope.decomposition import multiplier_of
from moescope.scores import column

#: Rows of one replay of the last position; prompts whose keys and values are held at once.
_ROWS, _PROMPTS = 1_024, 128

_NEURON = ("layer", "kind", "expert", "neuron")
_MEASURES = ("effect", "lpi", "gradient", "magnitude")


@torch.no_grad()
def faithfulness(
    run: CleanRun, frames: Mapping[str, pl.DataFrame], neurons: int = 400, seed: int = 0, progress: bool = False
) -> dict[str, pl.DataFrame]:
    """``faithfulness_prompts`` and its means over prompts, ``faithfulness``; within ``computing_in_float32``.

    ``frames``: ``ffn_neurons`` of this model and these prompts. ``neurons``: how many, stratified by layer, kind and
    decile of |importance| (``selection.sample``). ``effect``, ``lpi`` and ``gradient`` are nats, ``magnitude`` has the
    unit of the residual; a row for every prompt in which a neuron is active (routed: that is sent to its expert).
    Raises ReplayError where the last position cannot be run again by itself.
    """
    chosen = selection.sample(frames["ffn_neurons"], neurons, seed)
    pairs = _pairs(run, chosen)
    for group in tqdm(replay.by_length(run), desc="neuron by neuron", unit="batch", disable=not progress):
        for rows, ids in zip(group.rows.split(_PROMPTS), group.ids.split(_PROMPTS), strict=True):
            _measure(run, rows, ids, pairs)
    measured = pl.DataFrame({name: column(getattr(pairs, name)) for name in _MEASURES})
    ids = chosen.select(_NEURON)[pairs.neuron.cpu().numpy()]
    prompts = run.prompts.select("prompt_id")[pairs.prompt.cpu().numpy()]
    table = tables.check(pl.concat([ids, prompts, measured], how="horizontal"), "faithfulness_prompts")
    means = table.group_by(_NEURON).agg(pl.len().alias("active"), pl.col(_MEASURES).cast(pl.Float64).mean())
    return {"faithfulness": tables.check(means, "faithfulness"), "faithfulness_prompts": table}


@dataclass
class _Pairs:
    """The N sampled neurons, ``layer`` [N] and ``value`` [N, d], and all M pairs of one and a prompt it is active in:
    numbers of ``neuron`` and ``prompt``, ``coefficient``, and what is measured, all [M]. Value and coefficient are
    those before a norm behind the branch, where there is one."""

    layer: Tensor
    value: Tensor
    neuron: Tensor
    prompt: Tensor
    coefficient: Tensor
    lpi: Tensor
    magnitude: Tensor
    effect: Tensor
    gradient: Tensor


def _pairs(run: CleanRun, chosen: pl.DataFrame) -> _Pairs:
    """Effect and gradient still to be measured."""
    numbered = chosen.with_row_index("number").group_by("layer", "kind", "expert", maintain_order=True)
    values, parts = [], []
    for layer, kind, expert, numbers, neurons in numbered.agg("number", "neuron").rows():
        (site,) = run.decomposition.at(layer, kind)
        record = run.trace.layers[layer]
        coefficients = record.coefficients[site.name]
        prompts = torch.arange(len(coefficients), device=coefficients.device)
        if kind == "routed":
            prompts, slots = torch.where(record.index == expert)
            coefficients = coefficients[prompts, slots]
        coefficients = coefficients[:, neurons]
        value = site.mapped_values(expert)[neurons].float()
        base = run.readout.base(record.bases[site.branch], prompts)
        (scores,) = run.readout.of_neurons(base, [lpi.Neurons(value, coefficients)], lpi.Certificate())
        neuron = torch.tensor(numbers, device=prompts.device).expand(len(prompts), -1)
        magnitude = coefficients.double().abs() * value.double().norm(dim=1)
        prompt = prompts[:, None].expand_as(neuron)
        if site.norm is not None:
            value = site.stored(expert).detach()[neurons].float()
            coefficients = coefficients / record.factors[site.branch][prompts]
        values.append(value)
        parts.append([x.flatten() for x in (neuron, prompt, coefficients, scores, magnitude)])
    neuron, prompt, coefficient, scores, magnitude = map(torch.cat, zip(*parts, strict=True))
    layers = torch.tensor(chosen["layer"].to_list(), device=neuron.device)
    unknown = (torch.full_like(scores, torch.nan) for _ in range(2))
    return _Pairs(layers, torch.cat(values), neuron, prompt, coefficient, scores, magnitude, *unknown)


def _measure(run: CleanRun, rows: Tensor, ids: Tensor, pairs: _Pairs) -> None:
    """Effect and gradient x activation of the pairs whose prompts are ``rows`` (of one length, with token ``ids``)."""
    last = replay.LastPosition(run.decomposition, ids, run.target[rows])
    residuals = [record.residual_out[rows] for record in run.trace.layers]
    gradients = last.gradients(residuals)
    whole = replay.log_prob(run.trace.logits[rows], run.target[rows]).cpu().numpy()
    everyone = torch.arange(len(rows), device=rows.device)
    place = torch.full((len(run.prompts),), -1, device=rows.device)
    place[rows] = everyone
    for layer in pairs.layer.unique().tolist():
        clean = last.log_prob(layer, residuals[layer], everyone)
        replay.verified(run.model, clean.cpu().numpy(), whole)
        here = (pairs.layer[pairs.neuron] == layer) & (place[pairs.prompt] >= 0)
        for some in here.nonzero()[:, 0].split(_ROWS) if here.any() else ():
            prompt, coefficient = place[pairs.prompt[some]], pairs.coefficient[some]
            value = pairs.value[pairs.neuron[some]]
            lost, slope = _lost(run, layer, pairs.prompt[some], coefficient[:, None] * value)
            pairs.effect[some] = clean[prompt] - last.log_prob(layer, residuals[layer][prompt] - lost, prompt)
            pairs.gradient[some] = (slope.double() * gradients[layer][prompt].double()).sum(1)


def _lost(run: CleanRun, layer: int, prompts: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer writes less at the prompts [n] where its feed-forward part puts out ``part`` [n, d] less, and its
    derivative by the share of it that is taken: the same, but for a norm behind the part."""
    site = run.decomposition.components(layer)["ffn"][0]
    if site.norm is None:
        return part, part
    record = run.trace.layers[layer]
    output, multiplier = record.outputs[site.branch][prompts], multiplier_of(run.decomposition.layers[layer])
    return multiplier * site.norm.lost(output, part), multiplier * site.norm.slope(output, part)
