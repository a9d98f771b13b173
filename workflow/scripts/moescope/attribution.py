"""One loaded model and a table of prompts -> every table of one checkpoint: who raises the target's log-probability.

One forward pass records what each layer wrote at the last position (``decomposition``), one pass over the layers scores
every neuron, head and layer component (``lpi``) and keeps sums over prompts, not a score per (prompt, neuron).
"""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor, nn
from tqdm import tqdm

from moescope import lpi, memory, tables
from moescope.clean import CleanRun
from moescope.decomposition import DecompositionError, LayerTrace, Site, Trace, routed_rows
from moescope.precision import computing_in_float32
from moescope.scores import Scores, column
from moescope.timing import Stages, gemm_rate


def attribute(
    model: nn.Module,
    tokenizer: object,
    prompts: pl.DataFrame,
    target: str = "object",
    uncertainty: str = "groups",
    norm: str = "final",
    progress: bool = False,
    mem_mb: int | None = None,
) -> dict[str, pl.DataFrame]:
    """Score every neuron, head and layer of a causal LM on prompts (a ``prompts`` table).

    ``target``: ``object`` (the first token of the object) or ``argmax`` (the model's own top token). ``uncertainty``:
    ``groups`` adds the group sums and the top active neurons, ``none`` leaves them out. ``norm``: the final norm's
    statistic is ``final`` (that of the prompt's last residual) or ``local`` (measured anew for each residual that is
    read; slower). ``mem_mb``: what the process may use (all that is free: None); fewer prompts are scored together
    where it is little. Returns frames by the names of ``tables.SCHEMAS``; scores are nats. Raises what ``CleanRun.of``
    raises, and MemoryPlanError where it is too little.
    """
    return attribute_with_report(model, tokenizer, prompts, target, uncertainty, norm, progress, mem_mb)[0]


def attribute_with_report(
    model: nn.Module,
    tokenizer: object,
    prompts: pl.DataFrame,
    target: str = "object",
    uncertainty: str = "groups",
    norm: str = "final",
    progress: bool = False,
    mem_mb: int | None = None,
) -> tuple[dict[str, pl.DataFrame], dict]:
    """The same, and a report: ``decomposition_error``, ``remarks`` (what asks for care in a model of this build,
    ``docs/families.md``), ``router`` (what it makes of its logits), ``prompts_at_once`` and the LPI ``certificate``
    with the seconds of each stage and the rate of its float32 operations beside that of a plain matrix product."""
    stages = Stages()
    plan = memory.plan(memory.Shape.of(model), len(prompts), mem_mb, local=norm == "local")
    memory.keep_pages()
    with torch.no_grad(), computing_in_float32(model):
        with stages("forward"):
            run = CleanRun.of(model, tokenizer, prompts, target, norm)
        scores = Scores(run.trace, run.prompts, uncertainty == "groups")
        _score(run, scores, plan, stages, progress)
        with stages("tables"):
            memory.release_pages()
            frames = {"predictions": _predictions(run), **scores.frames()}
            for name in frames:  # one after the other, so that none stays beside its sorted copy
                frames[name] = tables.check(frames[name], name)
        rate = {"flops_per_second_of_a_product": gemm_rate(run.decomposition.device)}
    scoring = stages.seconds["attention"] + stages.seconds["feed_forward"]
    certificate = scores.certificate.as_dict()
    certificate |= {"flops_per_second": certificate["flops"] / scoring, **rate, "seconds": stages.rounded()}
    report = {"decomposition_error": run.error, "remarks": run.remarks, "router": run.trace.scoring}
    return frames, report | {"certificate": certificate, "prompts_at_once": plan.prompts}


def ffn_scores(layer: int, run: CleanRun, certificate: lpi.Certificate) -> Tensor:
    """LPI [P, n] (float64, nats) of the neurons of a dense feed-forward layer, in the order of ``ffn_neurons``.

    Raises DecompositionError where the layer has none.
    """
    sites = run.decomposition.at(layer, "dense")
    if not sites:
        raise DecompositionError(f"layer {layer} has no dense feed-forward part; name a dense model")
    base = run.readout.base(run.trace.base(layer, "ffn"))
    return _score_site(sites[0], run.trace.layers[layer], slice(None), base, run, certificate)[0]


def _score(run: CleanRun, scores: Scores, plan: memory.Plan, stages: Stages, progress: bool) -> None:
    """One pass over the layers: the distribution that attention or the feed-forward part reads, and from it the scores
    of all that it writes."""
    trace = run.trace
    halves = [(i, component) for i in range(len(trace.layers)) for component in run.decomposition.components(i)]
    total = sum(s.neurons * max(1, s.experts) for s in run.decomposition.sites)
    with tqdm(total=total, desc="scoring", unit="neuron", unit_scale=True, disable=not progress) as bar:
        before = [_score_component(*half, run, scores, plan, stages, bar) for half in halves]
    read = [trace.base(*half) for half in halves]
    for i, half in enumerate(halves):
        residual = _residual_after(trace, *half)
        with stages("distributions"):  # what one half leaves is, as a rule, what the next one reads
            known = i + 1 < len(read) and torch.equal(residual, read[i + 1])
            after = before[i + 1] if known else run.readout.log_prob(residual)
        scores.components.append((*half, after - before[i]))
    for layer in range(len(trace.layers)):  # a half that a layer does not have adds nothing
        for missing in set(tables.COMPONENTS) - set(run.decomposition.components(layer)):
            scores.components.append((layer, missing, torch.zeros_like(before[0])))


def _score_component(
    layer: int, component: str, run: CleanRun, scores: Scores, plan: memory.Plan, stages: Stages, bar: tqdm
) -> Tensor:
    """Score the sites of half a layer; what it reads gives the target log p(target) [P], which is returned."""
    record, of_target = run.trace.layers[layer], []
    sites = run.decomposition.components(layer)[component]
    found: dict[str, list[tuple[Tensor, Tensor | None]]] = {site.name: [] for site in sites}
    for rows in torch.arange(len(run.prompts), device=run.trace.final.device).split(plan.prompts):
        with stages("distributions"):
            base = run.readout.base(run.trace.base(layer, component), rows)
        of_target.append(base.of_target)
        for site in sites:
            with stages("attention" if site.kind == "attn" else "feed_forward"):
                found[site.name].append(_score_site(site, record, rows, base, run, scores.certificate))
            bar.update(site.neurons * max(1, site.experts) * len(rows) / len(run.prompts))
    for site in sites:
        with stages("tables"):
            neurons, heads = (torch.cat(x) if x[0] is not None else None for x in zip(*found[site.name], strict=True))
            if site.kind == "routed":
                scores.add_experts(site, record, neurons)
            else:
                scores.add_site(site, record.coefficients[site.name], neurons)
            if heads is not None:
                scores.heads.append((layer, heads))
    return torch.cat(of_target)


def _score_site(
    site: Site,
    record: LayerTrace,
    rows: Tensor | slice,
    base: lpi.Base,
    run: CleanRun,
    certificate: lpi.Certificate,
) -> tuple[Tensor, Tensor | None]:
    """LPI of the neurons of a site for some prompts, [p, n] or (experts) [p, K, I], and of its heads [p, heads]."""
    readout, coefficients = run.readout, record.coefficients[site.name][rows]
    if site.heads:
        return readout.of_heads(base, lpi.Neurons(site.mapped_values(), coefficients), site.heads, certificate)
    if site.kind != "routed":
        return readout.of_neurons(base, [lpi.Neurons(site.mapped_values(), coefficients)], certificate)[0], None
    routed = list(routed_rows(record.index[rows]))
    parts = [lpi.Neurons(site.mapped_values(expert), coefficients[some, slots], some) for expert, some, slots in routed]
    scores = torch.empty_like(coefficients, dtype=torch.float64)
    for (_, some, slots), found in zip(routed, readout.of_neurons(base, parts, certificate), strict=True):
        scores[some, slots] = found
    return scores, None


def _residual_after(trace: Trace, layer: int, component: str) -> Tensor:
    """The base residual of half a layer with all that it writes. In a sequential layer that is a residual which was
    there: what the other half reads, or what the layer leaves."""
    record, base = trace.layers[layer], trace.base(layer, component)
    rebuilt = base + trace.component_write(layer, component)
    near = 1e-5 * (rebuilt - base).abs().max()
    real = [*record.bases.values(), record.residual_out]
    return next((r for r in real if (r - rebuilt).abs().max() <= near), rebuilt)


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
