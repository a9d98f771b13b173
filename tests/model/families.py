"""What is measured of every family of the zoo; asserted by ``test_families`` and written down by ``make families``.

Every function measures one claim as the largest error found, against ``references`` or against the model itself run
another way. Errors of logits and of LPI are relative to 1 + their size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import polars as pl
import torch
from torch import Tensor, nn

from moescope import ablation, attribution, clean, faithfulness, interventions, precision, routing, selection, targets
from moescope.clean import CleanRun
from moescope.decomposition import Decomposition, Site, decoder_of
from moescope.interventions import Target
from moescope.routing import watched
from tests.model import models, references, zoo

IDS = torch.randint(3, 320, (3, 9), generator=torch.Generator().manual_seed(0))
WAYS = ("reroute", "reroute_logit", "min_logit", "zero_weight")


@dataclass
class Case:
    """A model of a family, and its clean run on a table of prompts."""

    name: str
    model: nn.Module
    run: CleanRun
    frames: dict[str, pl.DataFrame]
    report: dict = field(repr=False)

    @classmethod
    @functools.cache
    def of(cls, name: str) -> Case:
        model, prompts = zoo.build(name), models.prompts()
        frames, report = attribution.attribute_with_report(model, models.tokenizer(), prompts)
        with torch.no_grad(), precision.computing_in_float32(model):
            return cls(name, model, CleanRun.of(model, models.tokenizer(), prompts), frames, report)

    @property
    def decomposition(self) -> Decomposition:
        return self.run.decomposition

    def sites(self, *kinds: str) -> list[Site]:
        return [site for site in self.decomposition.sites if not kinds or site.kind in kinds]

    def path(self, module: nn.Module) -> str:
        return next(name for name, m in self.model.named_modules() if m is module)

    @property
    def parallel(self) -> bool:
        """Whether both halves of a layer read the same residual."""
        return self.name in zoo.PARALLEL

    @functools.cached_property
    def entering(self) -> list[Tensor]:
        """What every layer reads at the last position of the prompts, each run alone: [P, d] per layer."""
        return [torch.stack(rows) for rows in zip(*map(self._alone, self.run.targets), strict=True)]

    def _alone(self, target: targets.Target) -> list[Tensor]:
        seen: list[Tensor] = []
        keep = lambda m, a, k: seen.append((a[0] if a else k["hidden_states"])[0, -1])  # noqa: E731
        hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in self.decomposition.layers]
        logits(self.model, torch.tensor([target.tokens]))
        for hook in hooks:
            hook.remove()
        return seen

    def base(self, layer: int, component: str) -> Tensor:
        """The residual that half a layer reads: the layer's, with what attention wrote unless they are parallel."""
        if component == "attn" or self.parallel or "attn" not in self.decomposition.components(layer):
            return self.entering[layer]
        return self.entering[layer] + self.run.trace.component_write(layer, "attn")


def logits(model: nn.Module, ids: Tensor = IDS, **options: object) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def layer_of(decomposition: Decomposition) -> int:
    """The first layer that routes."""
    return next(site.layer for site in decomposition.sites if site.kind == "routed")


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs() / (1 + other.abs())).max().item()


# ---- the residual stream and the scores ----------------------------------------------------------------------------


def identity(case: Case) -> float:
    """The layers' own outputs, one prompt at a time, against the contributions in a batch; of a layer's update."""
    worst, seen = 0.0, []

    def keep(_: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out))

    for p, target in enumerate(case.run.targets):
        seen.clear()
        hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in case.decomposition.layers]
        logits(case.model, torch.tensor([target.tokens]))
        for hook in hooks:
            hook.remove()
        for i, (before, after) in enumerate(seen):
            update = (after - before)[0, -1].double()
            written = sum(case.run.trace.write(site)[p].double() for site in case.decomposition.at(i))
            worst = max(worst, ((written - update).abs().max() / update.abs().max()).item())
    return worst


def telescoping(case: Case) -> float:
    """Sums of all components against log p at the end less log p at the beginning, in nats."""
    total = case.frames["layers"].group_by("prompt_id").agg(pl.col("lpi").cast(pl.Float64).sum()).sort("prompt_id")
    read = case.frames["predictions"].sort("prompt_id").select(pl.col("log_prob") - pl.col("log_prob_h0")).to_series()
    return (total["lpi"] - read).abs().max()


def scores(case: Case) -> float:
    """LPI of every neuron and head of two prompts against the model's own norm and head in float64."""
    run, worst = case.run, 0.0
    reader = references.Reader(case.model, case.path(decoder_of(case.model)), case.path(case.decomposition.norm))
    for p in (0, 5):
        prompt = run.prompts["prompt_id"][p]
        final, target = run.trace.final[p], int(run.target[p])
        for site in case.sites():
            base = case.base(site.layer, site.component)[p]
            for found, vectors in _found(case, site, p, prompt):
                truth = reader(torch.cat([base[None], base.double() + vectors]), final, target)
                worst = max(worst, difference(found, truth[1:] - truth[0]))
    return worst


def _found(case: Case, site: Site, p: int, prompt: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(LPI [n], vectors [n, d]) of the neurons of a site for one prompt, from the tables, and of its heads."""
    record = case.run.trace.layers[site.layer]
    listed = case.frames["top_active"].filter(
        pl.col("prompt_id") == prompt, pl.col("layer") == site.layer, pl.col("component") == site.component
    )
    c = record.coefficients[site.name][p].double()
    if site.kind == "routed":
        for k, e in enumerate(record.index[p].tolist()):
            rows = listed.filter(pl.col("kind") == "routed", pl.col("expert") == e).sort("neuron")
            yield _lpi(rows), c[k, rows["neuron"].to_list(), None] * site.values(e).double()[rows["neuron"].to_list()]
        return
    width = site.neurons // max(1, site.heads)
    rows = listed if site.kind == "attn" else listed.filter(pl.col("kind") == site.kind)
    numbers = (rows["head"].fill_null(0) * width + rows["neuron"]).to_list()
    vectors = c[:, None] * site.values().double()
    yield _lpi(rows), vectors[numbers]
    if site.heads:
        heads = case.frames["heads"].filter(pl.col("prompt_id") == prompt, pl.col("layer") == site.layer).sort("head")
        yield _lpi(heads), vectors.view(site.heads, width, -1).sum(1)


def _lpi(rows: pl.DataFrame) -> Tensor:
    assert len(rows), "every neuron of these models is among the largest"
    return torch.from_numpy(rows["lpi"].cast(pl.Float64).to_numpy(writable=True))


# ---- what is taken away --------------------------------------------------------------------------------------------


def neurons(case: Case) -> float:
    """Zeroed feed-forward neurons against a copy in which they are never computed."""
    worst, some = 0.0, [3, 0, 17]
    for site in case.sites("dense", "shared"):
        with interventions.zeroed(case.decomposition, [Target(site.layer, site.kind, some)]):
            found = logits(case.model)
        broken = references.without_neurons(case.model, case.path(site.module), some)
        worst = max(worst, _moved(case, found, difference(found, logits(broken))))
    return worst


def ablations(case: Case) -> float:
    """Log-probabilities of ``ablations``, which runs no more than it must, against whole passes, in nats."""
    run = case.run
    table = ablation.ablate(case.model, models.tokenizer(), run.prompts, case.frames, seeds=1)["ablations"]
    plan = selection.plan(case.frames, run.prompts, ("signed",), seeds=1, seed=0)
    chosen = {(i.site, i.size, i.fold): i for i in plan.interventions if i.control == "none"}
    worst = 0.0
    for (site, size, fold), which in chosen.items():
        rows = table.filter(
            pl.col("site") == site, pl.col("size") == size, pl.col("fold").eq_missing(fold), pl.col("control") == "none"
        )
        expected = dict(rows.select("prompt_id", "log_prob").rows())
        with interventions.zeroed(case.decomposition, _targets(case, plan.index[site][which.units])):
            for p in which.prompts.tolist():
                said = logits(case.model, torch.tensor([run.targets[p].tokens]))[0, -1].double().log_softmax(-1)
                worst = max(worst, abs(said[run.target[p]].item() - expected[run.prompts["prompt_id"][p]]))
    assert {site for site, _, _ in chosen} == {"head", "ffn_neuron"}
    return worst


def _targets(case: Case, units: pl.DataFrame) -> list[Target]:
    if "head" in units.columns:
        return [interventions.head(case.decomposition, *row) for row in units.select("layer", "head").rows()]
    rows = units.select("layer", "kind", "expert", "neuron").rows()
    return [Target(layer, kind, [neuron], expert) for layer, kind, expert, neuron in rows]


def effects(case: Case) -> float:
    """What single neurons are worth at the last position, run again from there, against whole passes, in nats."""
    run, worst = case.run, 0.0
    with torch.no_grad(), precision.computing_in_float32(case.model):
        found = faithfulness.faithfulness(run, case.frames, 24)["faithfulness_prompts"]
    row_of = {prompt: p for p, prompt in enumerate(run.prompts["prompt_id"])}
    rows = found.filter(pl.col("prompt_id").is_in(run.prompts["prompt_id"][0:9:4].to_list()))
    assert len(rows) > 10
    for row in rows.to_dicts():
        p = row_of[row["prompt_id"]]
        ids, target = torch.tensor([run.targets[p].tokens]), run.target[p]
        (site,) = case.decomposition.at(row["layer"], row["kind"])

        def lessen(module: nn.Module, args: tuple, out: Tensor, row=row) -> Tensor:
            last = args[0].flatten(0, -2)[-1]
            if row["kind"] == "routed":
                weight = (args[2][-1] * (args[1][-1] == row["expert"])).sum()
                neuron = weight * references._neurons(module, row["expert"], last)[row["neuron"]]
                down = module.down_proj[row["expert"]]
                value = down[row["neuron"]] if module.is_transposed else down[:, row["neuron"]]
            else:
                rows = module.weight if isinstance(module, nn.Linear) else module.weight.T
                neuron, value = last[row["neuron"]], rows[:, row["neuron"]]
            out = out.clone()
            out.view(-1, out.shape[-1])[-1] -= neuron * value
            return out

        before = logits(case.model, ids)[0, -1].double().log_softmax(-1)[target]
        hook = site.module.register_forward_hook(lessen)
        with torch.no_grad():
            after = logits(case.model, ids)[0, -1].double().log_softmax(-1)[target]
        hook.remove()
        worst = max(worst, abs(row["effect"] - (before - after).item()))
    return worst


def experts(case: Case) -> float:
    """Neurons of an expert, and the whole of it, taken away, against a loop over positions and slots."""
    some, worst = [3, 0, 17], difference(_slow(case, {}, {}), case_logits(case))
    for site in case.sites("routed"):
        e = _popular(case, site)
        with interventions.zeroed(case.decomposition, [Target(site.layer, "routed", some, e)]):
            found = logits(case.model)
        worst = max(worst, _moved(case, found, difference(found, _slow(case, {}, {site.module: {e: some}}))))
        with interventions.zero_weight(case.decomposition, {site.layer: [e]}):
            found = logits(case.model)
        worst = max(worst, _moved(case, found, difference(found, _slow(case, {site.module: {e}}, {}))))
    return worst


def _slow(case: Case, experts: dict, neurons: dict) -> Tensor:
    with references.slow_experts(case.model, references.Experts(experts, neurons)):
        return logits(case.model)


def heads(case: Case) -> float:
    """Zeroed heads against attention that gives 0 for them; where a family calls attention otherwise, against their
    part of what the output matrix reads."""
    worst = 0.0
    for site in case.sites("attn"):
        if not site.heads:
            continue
        assert site.heads == 4
        some = [0, 3]
        cut = [interventions.head(case.decomposition, site.layer, number) for number in some]
        with interventions.zeroed(case.decomposition, cut):
            found = logits(case.model)
        owner = case.model.get_submodule(case.path(site.module).rpartition(".")[0])
        with references.silent_heads(owner, some) as called:
            truth = logits(case.model)
        if not called:
            width = site.neurons // 4  # all of the zoo have four
            silence = lambda m, a, n=width: (torch.cat([a[0][..., :n] * 0, a[0][..., n:-n], a[0][..., -n:] * 0], -1),)  # noqa: E731
            hook = site.module.register_forward_pre_hook(silence)
            truth = logits(case.model)
            hook.remove()
        worst = max(worst, _moved(case, found, difference(found, truth)))
    return worst


@functools.cache
def _clean(name: str) -> Tensor:
    return logits(Case.of(name).model)


def case_logits(case: Case) -> Tensor:
    return _clean(case.name)


def _moved(case: Case, found: Tensor, error: float) -> float:
    """The error of an intervention, which must do something, and leave no trace."""
    assert not torch.allclose(found, case_logits(case), rtol=1e-4, atol=1e-4), "nothing was taken away"
    assert torch.equal(logits(case.model), case_logits(case)), "the model did not come back"
    return error


def _popular(case: Case, site: Site) -> int:
    """The expert that most positions are sent to."""
    return int(routings(case)[site.layer].index.flatten().bincount(minlength=site.experts).argmax())


# ---- routers -------------------------------------------------------------------------------------------------------


def routings(case: Case) -> dict[int, routing.Routing]:
    with watched(case.decomposition) as found:
        logits(case.model)
    return found


def rerouting(case: Case, how: str) -> float:
    """The weights of all experts at all positions against a router written by hand; one or two experts blocked (in
    groups of three with two to choose, one is all that can be), or none."""
    worst = 0.0
    for site in case.sites("routed"):
        blocked = [_popular(case, site)]
        if case.name in references.RULES and references.RULES[case.name].groups is None:
            blocked.append((blocked[0] + 1) % site.experts)
        said = _logits_of(case, site)
        blocking = interventions.block(case.decomposition, {site.layer: blocked}, how) if how else nullcontext()
        with blocking, watched(case.decomposition) as found:
            changed = logits(case.model)
        expected = by_hand(case, site, said, blocked, how)
        for position, (index, weight) in enumerate(zip(found[site.layer].index, found[site.layer].weight, strict=True)):
            mine = dict(zip(index.tolist(), weight.double().tolist(), strict=True))
            assert mine.keys() == expected[position].keys(), (case.name, how, position)
            if how in ("reroute", "min_logit"):
                assert not mine.keys() & set(blocked)
            worst = max(worst, *(abs(w - expected[position][e]) for e, w in mine.items()))
        worst = max(worst, _moved(case, changed, 0.0) if how else difference(changed, case_logits(case)))
    return worst


def by_hand(case: Case, site: Site, said: Tensor, blocked: list[int], how: str) -> list[dict[int, float]]:
    block = case.model.get_submodule(case.path(site.module).rpartition(".")[0])
    chosen = routings(case)[site.layer].index.shape[1]
    if case.name == "phimoe":
        return [references.sparsemixer(z, blocked, how, site.router.router_jitter_noise) for z in said]
    biases = [(n, t) for n, t in [*block.named_parameters(), *block.named_buffers()] if _corrects(n)]
    correction = biases[0][1].flatten().double() if biases else torch.zeros(site.experts, dtype=torch.float64)
    return references.route(references.RULES[case.name], said, correction, chosen, blocked, how)


def _corrects(name: str) -> bool:
    return name.endswith(("correction_bias", "expert_bias"))


def _logits_of(case: Case, site: Site) -> Tensor:
    """The router's logits in float64, from what it reads and its own matrix: [N, E]."""
    read: list[Tensor] = []
    hook = site.router.register_forward_pre_hook(lambda m, args: read.append(args[0].detach()))
    logits(case.model)
    hook.remove()
    (matrix,) = (p for p in site.router.parameters() if p.dim() == 2 and p.shape[0] == site.experts)
    z = read[0].flatten(0, -2).double() @ matrix.detach().double().T
    bias = next((p for n, p in site.router.named_parameters() if n.endswith("bias") and not _corrects(n)), None)
    return z if bias is None else z + bias.detach().double()


def forcing(case: Case) -> float:
    """An expert forced at every position against a loop over positions that adds it, or sets its weight."""
    worst = 0.0
    for site in case.sites("routed"):
        chosen = routings(case)[site.layer].index
        e = int((chosen.flatten().bincount(minlength=site.experts) - IDS.numel() // 2).abs().argmin())
        given = torch.linspace(0.1, 0.9, IDS.numel())
        with interventions.force(case.decomposition, site.layer, e, given):
            found = logits(case.model)

        def added(module: nn.Module, args: tuple, out: Tensor, e=e, given=given) -> Tensor:
            hidden, index, weight = args
            out = out.clone()
            for n in range(len(hidden)):
                own = sum(w.item() for j, w in zip(index[n].tolist(), weight[n], strict=True) if j == e)
                alone = references.Experts({}, {}).forward(
                    module, hidden[n : n + 1], torch.tensor([[e]]), torch.ones(1, 1)
                )
                out[n] += (given[n].item() - own) * alone[0]
            return out

        hook = site.module.register_forward_hook(added)
        with torch.no_grad():
            truth = logits(case.model)
        hook.remove()
        assert 0 < (chosen == e).sum() < IDS.numel(), "chosen at some positions, not at all"
        worst = max(worst, _moved(case, found, difference(found, truth)))
    return worst


def budgets(case: Case) -> float:
    """Weights of all slots at all positions where some are left, against the rules written by hand; for those without a
    correction also against the router itself, told to choose fewer."""
    worst = 0.0
    rule = references.RULES.get(case.name)  # of phimoe, every weight is a softmax of its own
    shared = rule is not None and (rule.normalised or (rule.score, rule.then) == ("chosen", "softmax"))
    choices = {site.layer: by_hand(case, site, _logits_of(case, site), [], "") for site in case.sites("routed")}
    for mode, n in (
        ("top_n", 0),
        ("top_n", 1),
        ("top_n", 2),
        ("only_rank", 1),
        ("only_rank", 2),
        ("drop_rank", 1),
        ("drop_rank", 2),
    ):
        for weights in ("family", "keep"):
            for site in case.sites("routed"):  # one at a time, so that all read what they read in the clean run
                found = _slots(case, site, mode, n, weights)
                for position, choice in enumerate(choices[site.layer]):
                    ranked = sorted(choice, key=lambda e: -choice[e])
                    left = {
                        "top_n": ranked[:n],
                        "only_rank": ranked[n - 1 : n],
                        "drop_rank": ranked[: n - 1] + ranked[n:],
                    }[mode]
                    rest, whole = sum(choice[e] for e in left), sum(choice.values())
                    factor = whole / rest if weights == "family" and shared and left else 1.0
                    mine = dict(zip(found.index[position].tolist(), found.weight[position].tolist(), strict=True))
                    wanted = {e: choice[e] * factor * (e in left) for e in choice}
                    worst = max(worst, *(abs(mine[e] - wanted[e]) for e in choice))
    return worst


def _slots(case: Case, site: Site, mode: str, n: int, weights: str) -> routing.Routing:
    """The choice of one layer, the others as they are."""
    alone = Decomposition(case.model)
    alone.sites, alone.normalises = [site], case.decomposition.normalises
    with watched(alone) as found, interventions.slots(alone, mode, n, weights):
        logits(case.model)
    return found[site.layer]


# ---- batches and implementations -----------------------------------------------------------------------------------


def batches(case: Case) -> float:
    """Coefficients, residuals and logits of prompts padded on the right and on the left against each alone."""
    tokens = [target.tokens for target in case.run.targets]
    longest = max(map(len, tokens))
    left = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in tokens])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in tokens])
    padded = case.decomposition.trace([(torch.arange(len(tokens)), left, mask)])
    worst = 0.0
    for p, ids in enumerate(tokens):
        alone = case.decomposition.trace(clean.batched([ids], torch.device("cpu")))
        for together in (case.run.trace, padded):
            worst = max(worst, difference(together.logits[p], alone.logits[0]))
            for mine, other in zip(together.layers, alone.layers, strict=True):
                worst = max(worst, difference(mine.residual_out[p], other.residual_out[0]))
                for name, c in other.coefficients.items():
                    worst = max(worst, difference(mine.coefficients[name][p], c[0]))
                if other.index is not None:
                    assert torch.equal(mine.index[p], other.index[0])
    return worst


def implementations(case: Case) -> float:
    """Logits, weights and LPI under each way that transformers has to run experts, against the default."""
    model, worst = case.model, 0.0
    before = model.config._experts_implementation
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        try:
            worst = max(worst, difference(logits(model), case_logits(case)))
            frames = attribution.attribute(model, models.tokenizer(), models.prompts())
        finally:
            model.set_experts_implementation(before)
        for table, column in (("ffn_neurons", "importance"), ("routing", "weight"), ("predictions", "log_prob")):
            mine, default = (torch.from_numpy(f[table][column].to_numpy(writable=True)) for f in (frames, case.frames))
            worst = max(worst, difference(mine, default))
        assert frames["routing"]["slot"].equals(case.frames["routing"]["slot"])
    return worst


# ---- the table of the documentation --------------------------------------------------------------------------------

Measure = Callable[[Case], float]

#: What is measured of every family, of those that route and of sequential ones; the largest error that may be found.
#: Contributions and scores are held to what is promised of them. Logits of random models amplify what float32 rounds
#: differently from kernel to kernel, up to 1e-5; what is really wrong is off by a hundredth at least.
EVERYWHERE: dict[str, tuple[Measure, float]] = {
    "identity": (identity, 1e-5),
    "LPI": (scores, 1e-5),
    "neurons": (neurons, 1e-4),
    "heads": (heads, 1e-4),
    "ablations": (ablations, 2e-4),
    "effects": (effects, 2e-4),
    "batches": (batches, 2e-4),
}
WHERE_ROUTED: dict[str, tuple[Measure, float]] = {
    "routing": (functools.partial(rerouting, how=""), 5e-5),
    "experts": (experts, 1e-4),
    **{way: (functools.partial(rerouting, how=way), 5e-5) for way in WAYS},
    "force": (forcing, 2e-4),
    "slots": (budgets, 5e-5),
    "implementations": (implementations, 2e-4),
}
SEQUENTIAL: dict[str, tuple[Measure, float]] = {"telescoping": (telescoping, 5e-5)}


@functools.cache
def measured(name: str, measure: str) -> float:
    """The error of a family."""
    case = Case.of(name)
    return measures(case)[measure][0](case)


def measures(case: Case) -> dict[str, tuple[Measure, float]]:
    """What is measured of a family."""
    routed = WHERE_ROUTED if case.sites("routed") else {}
    return EVERYWHERE | routed | ({} if case.parallel else SEQUENTIAL)
