"""Exact per-neuron decomposition of the residual stream.

A *site* is one matrix that writes to the residual stream: the attention output, a dense or shared feed-forward down
projection, or the fused experts. Neuron i of a site has a coefficient c_i (the i-th input of that matrix, with the
router's or the shared expert's gate where there is one) and a value v_i (its i-th column). In a pre-norm layer

    h_out = h_in + sum over sites of (sum_i c_i v_i + bias)

Where a norm stands behind a branch (OLMo-2, Gemma-2), what the branch puts out, y, is multiplied by gain / rms(y): the
gain goes into the values, 1 / rms(y), as it was measured, into the coefficients. So does a multiplier of the residual
(Granite). Such a contribution is exact as a share of what was written; taking a neuron away would change rms(y) too.

There is no table of families. Modules are found by shape and name suffix, the residual a branch reads by tensor
identity during the forward pass, and ``Trace.error`` compares the sum with what the layer really wrote, so a model that
does not fit is refused with the figure, not guessed.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moescope import scratch
from moescope.errors import MoescopeError
from moescope.norms import Norm

#: Names of the matrices that write to the stream, over all families of transformers: of feed-forward parts alone, and
#: those that attention has too.
FEED_FORWARD = {"down_proj", "dense_4h_to_h", "fc_out", "fc2", "w2", "output_linear"}
WRITERS = {"o_proj", "out_proj", "dense", "c_proj", "wo"} | FEED_FORWARD
MIXER = re.compile(r"attn|attention|mamba|conv|mixer", re.IGNORECASE)
#: What a router makes of its logits before it chooses: the first of these whose shares are the weights that it gives.
SCORINGS = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda probabilities: probabilities,
}
#: Largest error of a layer's rebuilt update relative to the update itself (max norm, float32).
TOLERANCE = 1e-5


class DecompositionError(MoescopeError):
    """The model has no additive residual stream of the kind that is taken apart here."""


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that owns the stack of layers (and the embedding and the final norm beside it)."""
    decoder = model.get_decoder() or model
    owners = (m for m in decoder.modules() if any(isinstance(c, nn.ModuleList) for c in m.children()))
    return next(owners, decoder)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers: the decoder's first ModuleList."""
    return next((c for c in decoder_of(model).children() if isinstance(c, nn.ModuleList)), nn.ModuleList())


def multiplier_of(layer: nn.Module) -> float:
    """What a layer multiplies the output of both branches with before it adds them to the stream (Granite)."""
    return float(getattr(layer, "residual_multiplier", 1.0))


def _is_experts(module: nn.Module) -> bool:
    """A fused experts module of transformers 5 (its decorator sets ``is_transposed``)."""
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, Tensor) and weight.dim() == 3 and hasattr(module, "is_transposed")


def first_of(output: object) -> Tensor:
    """What a module puts out, without what else it returns."""
    return output[0] if isinstance(output, tuple) else output


@dataclass(eq=False)
class Site:
    """One matrix that writes to the residual stream.

    ``kind`` is attn, dense, shared or routed; ``branch`` the child of the layer it lives in; ``gate`` a module whose
    sigmoid scales the whole site (Qwen's shared expert); ``heads`` the number of heads of an attention site (0: what
    mixes tokens there has none); ``router`` the module that chooses between routed experts.
    """

    layer: int
    kind: str
    name: str
    module: nn.Module
    gate: nn.Module | None = None
    heads: int = 0
    router: nn.Module | None = None
    #: the norm behind the branch, as found in a forward pass; None where there is none
    norm: Norm | None = None
    #: where values are handed out: that of the unembedding, where a model is spread over several GPUs
    device: torch.device | None = None

    @property
    def branch(self) -> str:
        return self.name.split(".")[0]

    @property
    def component(self) -> str:
        """The half of the layer that it belongs to: attn (whatever mixes tokens) or ffn."""
        return "attn" if self.kind == "attn" else "ffn"

    @property
    def experts(self) -> int:
        return self.module.down_proj.shape[0] if self.kind == "routed" else 0

    @property
    def neurons(self) -> int:
        """Neurons of the site (of one expert)."""
        return self.stored(0).shape[0]

    def stored(self, expert: int | None) -> Tensor:
        """The values as the model holds them, a view of its weight whatever its layout: [neurons, hidden]."""
        if self.kind == "routed":
            weight = self.module.down_proj[expert]
            return weight if self.module.is_transposed else weight.T
        weight = self.module.weight
        return weight.T if isinstance(self.module, nn.Linear) else weight  # Conv1D keeps [in, out]

    def values(self, expert: int | None = None) -> Tensor:
        """What each neuron writes per unit of coefficient: float32 [neurons, hidden]."""
        return self.mapped_values(expert).float()

    def mapped_values(self, expert: int | None = None) -> Tensor:
        """The same in the stored dtype, a view of the weight, wherever no norm behind the branch scales it."""
        return self._scaled(self.stored(expert).detach())

    def bias(self, expert: int | None = None) -> Tensor | None:
        """What the site (the expert) writes whatever its neurons do: float32 [hidden], or None."""
        if self.kind == "routed":
            bias = self.module.down_proj_bias[expert] if self.module.has_bias else None
        else:
            bias = self.module.bias
        return None if bias is None else self._scaled(bias.detach()).float()

    def _scaled(self, written: Tensor) -> Tensor:
        written = written.to(self.device)
        return written if self.norm is None else written.float() * self.norm.gain.to(self.device)


@dataclass
class LayerTrace:
    """What one layer did at the last position of P prompts (float32).

    ``residual_in``, ``residual_out`` [P, hidden]; ``bases`` the residual each branch reads, [P, hidden];
    ``coefficients`` [P, n] per site, [P, K, I] for routed experts; ``index`` and ``weight`` [P, K] the routed experts
    in ascending order and the weights really used; ``router`` [P, E] what the router says of all experts, its logits as
    a rule, and ``probability`` [P, E] what it makes of them before the choice (without the bias that corrects it; None
    where its weights are no shares of one); ``gates`` [P, 1] of gated sites; ``factors`` [P, 1] what the output of a
    branch is multiplied with, the same for all its neurons (1 in most models); ``outputs`` [P, hidden] what branches
    give to a norm behind them.
    """

    residual_in: Tensor | None = None
    residual_out: Tensor | None = None
    bases: dict[str, Tensor] = field(default_factory=dict)
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    index: Tensor | None = None
    weight: Tensor | None = None
    router: Tensor | None = None
    probability: Tensor | None = None

    def scatter(self, rows: Tensor, total: int, part: LayerTrace) -> None:
        """Put the rows of a batch into their places among ``total`` prompts."""
        for name, value in vars(part).items():
            mine = getattr(self, name)
            if isinstance(value, dict):
                for key, tensor in value.items():
                    mine[key] = _placed(mine.get(key), rows, total, tensor)
            elif value is not None:
                setattr(self, name, _placed(mine, rows, total, value))


def _placed(whole: Tensor | None, rows: Tensor, total: int, part: Tensor) -> Tensor:
    part = part.to(rows.device)  # layers may lie on several GPUs
    whole = scratch.empty((total, *part.shape[1:]), part) if whole is None else whole
    whole[rows] = part
    return whole


def routed_coefficients(experts: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """hidden [P, d], index and weight [P, K] -> [P, K, I]: router weight times act(gate) * up, routed experts only."""
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    bias = (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias) if experts.has_bias else None
    width = experts.down_proj.shape[1 if experts.is_transposed else 2]
    out = hidden.new_zeros(*index.shape, width)
    for e in index.unique().tolist():
        rows, slots = torch.where(index == e)
        z = hidden[rows] @ (up[e] if experts.is_transposed else up[e].T)
        z = z if bias is None else z + bias[e]
        out[rows, slots] = experts._apply_gate(z) if experts.has_gate else experts.act_fn(z)
    return out * weight[..., None]


class Decomposition:
    """The sites of a loaded model and a forward pass that records what they did.

    Raises DecompositionError where no site is found, or where weights cannot be read: offloaded, or packed by a
    quantisation.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers = layers_of(model)
        config = model.config.get_text_config()
        self.sites = [site for i, layer in enumerate(self.layers) for site in _sites(i, layer, config)]
        _require_readable(type(model).__name__, model, self.sites)
        self.norm = _final_norm(model)
        self.head = model.get_output_embeddings()
        #: how many values a layer returns, by layer, where it returned a tuple when it ran
        self.returns: dict[int, int] = {}
        #: whether the weights of a position add up to the same whatever it reads, by layer that routes, as a run showed
        self.normalises: dict[int, bool] = {}
        for site in self.sites:
            site.device = self.device

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def at(self, layer: int, *kinds: str) -> list[Site]:
        """The sites of one layer, of some kinds or of all."""
        return [s for s in self.sites if s.layer == layer and (not kinds or s.kind in kinds)]

    def routed(self) -> list[Site]:
        """The sites of all layers that route between experts."""
        return [site for site in self.sites if site.kind == "routed"]

    def components(self, layer: int) -> dict[str, list[Site]]:
        """The sites of a layer by component: attn and ffn, or the one of them that it has."""
        by_component = {name: [s for s in self.at(layer) if s.component == name] for name in ("attn", "ffn")}
        return {name: sites for name, sites in by_component.items() if sites}

    @torch.no_grad()
    def trace(self, batches: list[tuple[Tensor, Tensor, Tensor]]) -> Trace:
        """Run batches of (prompt rows [B], input ids [B, T], attention mask [B, T]) and record the last positions."""
        total = sum(len(rows) for rows, _, _ in batches)
        trace = Trace(self, [LayerTrace() for _ in self.layers])
        for rows, ids, mask in batches:
            final, logits, layers = self._run(ids, mask, trace.oddities)
            trace.final = _placed(trace.final, rows, total, final)
            trace.logits = _placed(trace.logits, rows, total, logits)
            for whole, part in zip(trace.layers, layers, strict=True):
                whole.scatter(rows, total, part)
        trace.read_routers()
        return trace

    def _run(self, ids: Tensor, mask: Tensor, oddities: list[str]) -> tuple[Tensor, Tensor, list[LayerTrace]]:
        positions = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)  # right for left, right and no padding
        recorder = _Recorder(ids.shape[1], positions, oddities)
        layers = [LayerTrace() for _ in self.layers]
        final: list[Tensor] = []
        handles = [self.norm.register_forward_pre_hook(lambda m, a: final.append(recorder.take(a[0])))]
        for i, (layer, record) in enumerate(zip(self.layers, layers, strict=True)):
            handles += recorder.hook(i, layer, record, self.at(i))
        options = {"output_router_logits": False} if hasattr(self.model.config, "output_router_logits") else {}
        if not mask[:, 0].all() and "position_ids" in inspect.signature(self.model.forward).parameters:
            # left padding: a model counts its positions from the first column, whatever the mask
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        try:
            out = self.model(ids, attention_mask=mask, use_cache=False, logits_to_keep=positions[:, None], **options)
        finally:
            for handle in handles:
                handle.remove()
        self.returns |= recorder.returns
        self.normalises |= recorder.normalises
        return final[-1], out.logits[:, 0].float(), layers


@dataclass
class Trace:
    """The last position of every prompt: per layer what was written, ``final`` [P, d] the residual before the final
    norm, ``logits`` [P, V] the model's own; ``scoring``: what its routers make of their logits (a name of ``SCORINGS``,
    None where there are no routers or none of those); ``oddities``: what in its build may be why it does not fit."""

    decomposition: Decomposition
    layers: list[LayerTrace]
    final: Tensor | None = None
    logits: Tensor | None = None
    scoring: str | None = None
    oddities: list[str] = field(default_factory=list)

    def base(self, layer: int, component: str) -> Tensor:
        """The residual that a component of a layer reads: [P, hidden]."""
        return self.layers[layer].bases[self.decomposition.components(layer)[component][0].branch]

    def write(self, site: Site) -> Tensor:
        """sum_i c_i v_i + bias of one site: [P, hidden]."""
        record = self.layers[site.layer]
        c, factor = record.coefficients[site.name], record.factors[site.branch]
        if site.kind != "routed":
            y, bias = c @ site.values(), site.bias()
            return y if bias is None else y + bias * record.gates.get(site.name, 1.0) * factor
        y = torch.zeros_like(record.residual_in)
        for e, rows, slots in routed_rows(record.index):
            z, bias = c[rows, slots] @ site.values(e), site.bias(e)
            y.index_add_(0, rows, z if bias is None else z + record.weight[rows, slots, None] * bias * factor[rows])
        return y

    def component_write(self, layer: int, component: str) -> Tensor:
        """Everything that a component of a layer (its A or F) adds to the stream: [P, hidden]."""
        return sum(self.write(s) for s in self.decomposition.components(layer)[component])

    def read_routers(self) -> None:
        """Find what the routers make of their logits, and with it the ``probability`` of every expert."""
        routed = [record for record in self.layers if record.index is not None]
        if not routed or any(record.router is None for record in routed):
            return
        self.scoring = scoring_of([(record.router, record.index, record.weight) for record in routed])
        if self.scoring is not None:
            for record in routed:
                record.probability = SCORINGS[self.scoring](record.router)

    @torch.no_grad()
    def error(self) -> float:
        """Largest |h_in + contributions - h_out| of any layer, relative to max |h_out - h_in| of that layer."""
        worst = 0.0
        for i, record in enumerate(self.layers):
            sites = self.decomposition.at(i)
            if any(s.name not in record.coefficients or s.branch not in record.factors for s in sites):
                return float("inf")  # a matrix that was found but not called as expected
            update = record.residual_out - record.residual_in
            rebuilt = sum((self.write(s) for s in sites), torch.zeros_like(update))
            size = update.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            error = ((rebuilt - update).abs().max() / size).item()
            worst = max(worst, error if error == error else float("inf"))  # NaN must not pass
        return worst

    def verified(self) -> float:
        """The error, or DecompositionError where it exceeds the tolerance, or where a layer has two sites of a kind,
        whose neurons would go by the same numbers: such a model is never scored."""
        name = type(self.decomposition.model).__name__
        found = Counter((site.layer, site.kind) for site in self.decomposition.sites)
        if twice := next((key for key, count in found.items() if count > 1), None):
            raise DecompositionError(f"{name}: layer {twice[0]} has two {twice[1]} parts; not supported")
        error = self.error()
        if not error <= TOLERANCE:
            odd = next((f", perhaps because {oddity}" for oddity in [*self.oddities, *self._uncalled()]), "")
            raise DecompositionError(
                f"{name}: contributions miss the residual stream by {error:.1e} of a layer's update (allowed: "
                f"{TOLERANCE:.0e}){odd}; this architecture or these weights are not supported"
            )
        if missing := {"attn", "ffn"} - {site.component for site in self.decomposition.sites}:
            raise DecompositionError(f"{name}: no layer has a part of kind {missing.pop()}; not supported")
        for layer in range(len(self.layers)):
            for component, sites in self.decomposition.components(layer).items():
                self._require_base(f"{name}: layer {layer}: its {component} part", layer, sites)
            after = self.layers[layer + 1].residual_in if layer + 1 < len(self.layers) else self.final
            if not _near(self.layers[layer].residual_out, after):
                raise DecompositionError(f"{name}: what layer {layer} leaves is not what comes next; not supported")
        return error

    def remarks(self) -> list[str]:
        """What asks for care when the scores of this model are read (``docs/families.md``)."""
        sites, layers = self.decomposition.sites, range(len(self.layers))
        two = [i for i in layers if len(self.decomposition.components(i)) == 2]
        facts = {
            "norm behind": any(site.norm is not None for site in sites),
            "parallel": any(torch.equal(self.base(i, "attn"), self.base(i, "ffn")) for i in two),
            "no heads": any(not site.heads for site in sites if site.kind == "attn"),
            "router of its own": bool(self.decomposition.routed()) and self.scoring is None,
        }
        return [remark for remark, holds in facts.items() if holds]

    def _uncalled(self) -> Iterator[str]:
        for site in self.decomposition.sites:
            record = self.layers[site.layer]
            if site.name not in record.coefficients or site.branch not in record.factors:
                yield f"layer {site.layer} does not call {site.name} as part of one of its own modules"

    def _require_base(self, what: str, layer: int, sites: list[Site]) -> None:
        bases = [self.layers[layer].bases.get(site.branch) for site in sites]
        if any(base is None or base.shape != self.final.shape for base in bases):
            raise DecompositionError(f"{what} does not read the residual stream as it is; not supported")
        if any(not torch.equal(base, bases[0]) for base in bases):
            raise DecompositionError(f"{what} reads two residuals; not supported")
        entering, halves = self.layers[layer].residual_in, self.decomposition.components(layer)
        between = (entering + self.component_write(layer, half) for half in halves)  # lazily: experts are many
        if not _near(bases[0], entering) and not any(_near(bases[0], residual) for residual in between):
            raise DecompositionError(f"{what} does not read the residual stream as it is; not supported")


def _near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 10 * TOLERANCE * other.abs().max())


def scoring_of(choices: list[tuple[Tensor, Tensor, Tensor]]) -> str | None:
    """The one of ``SCORINGS`` that explains the choices of all layers, each (what the router says [N, E], index and
    weight [N, K] of the experts that are used); None where none does, or more than one (of a single expert whose weight
    is normalised, nothing can be told)."""
    found = [name for name, scoring in SCORINGS.items() if all(_gives_shares(scoring, *c) for c in choices)]
    return found[0] if len(found) == 1 else None


def _gives_shares(scoring: Callable[[Tensor], Tensor], router: Tensor, index: Tensor, weight: Tensor) -> bool:
    """Whether the weights really used are the scores of the chosen experts, all times one number, or each position's
    divided by their sum and times one number."""
    rounding, equal = _rounding(weight), sums_are_equal(weight)
    chosen, weight = scoring(router.float()).gather(1, index), weight.float()
    shares = [x / x.sum(1, keepdim=True) for x in (chosen, weight)]
    if (chosen < 0).any() or not torch.allclose(*shares, rtol=rounding, atol=1e-5):
        return False
    factor = weight.sum(1) / chosen.sum(1)
    return equal or torch.allclose(factor, factor[:1].expand_as(factor), rtol=rounding)


def sums_are_equal(weight: Tensor) -> bool:
    """Whether the weights [N, K] of every position have the same sum, but for what their dtype rounds."""
    total = weight.float().sum(1)
    return torch.allclose(total, total[:1].expand_as(total), rtol=_rounding(weight))


def _rounding(weight: Tensor) -> float:
    """How far weights may be off that were rounded on the way, relative."""
    return max(1e-3, 4 * torch.finfo(weight.dtype).eps)


def routed_rows(index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """index [P, K] -> (expert, prompt rows, slots) of every expert that some prompt is routed to, ascending."""
    flat, order = index.reshape(-1).sort(dim=0, stable=True)
    experts, counts = flat.unique_consecutive(return_counts=True)
    for e, where in zip(experts.tolist(), order.split(counts.tolist()), strict=True):
        yield e, where // index.shape[1], where % index.shape[1]


def _final_norm(model: nn.Module) -> nn.Module:
    """The norm that stands beside the layers (the last one, where there are several)."""
    norms = [m for m in decoder_of(model).children() if "norm" in type(m).__name__.lower()]
    if not norms:
        raise DecompositionError(f"{type(model).__name__}: no final norm was found; not supported")
    return norms[-1]


def _sites(index: int, layer: nn.Module, config: object) -> Iterator[Site]:
    routes = any(_is_experts(m) for m in layer.modules())
    for name, module in layer.named_modules():
        branch, leaf = name.partition(".")[0], name.rpartition(".")[2]
        block = layer.get_submodule(branch) if name else layer
        owner = layer.get_submodule(name.rpartition(".")[0])
        if _is_experts(module):
            yield Site(index, "routed", name, module, router=_router(owner, module))
        elif leaf in WRITERS and getattr(module, "weight", None) is not None and module.weight.dim() == 2:
            mixes = MIXER.search(branch) and not (leaf in FEED_FORWARD or any(_is_experts(m) for m in block.modules()))
            if mixes:
                site = Site(index, "attn", name, module)
                site.heads = _heads(owner, site.neurons, config)
                yield site
            else:
                gate = getattr(block, "shared_expert_gate", None)
                yield Site(index, "shared" if routes else "dense", name, module, gate=gate)


def _heads(mixer: nn.Module, neurons: int, config: object) -> int:
    """Heads of what mixes tokens, by the width that the module itself gives them: of attention, which may differ from
    layer to layer, or of linear attention, which counts those of its values. State space models and convolutions have
    none (linear attention passes its input through a convolution too, but says how wide its heads are)."""
    if (linear := getattr(mixer, "num_v_heads", None)) is not None:
        return linear
    convolves = any(isinstance(m, nn.Conv1d) for m in mixer.modules())
    if convolves and "attention" not in type(mixer).__name__.lower():
        return 0
    # a norm without weights over several heads at once makes one of them (differential attention)
    joined = [m.normalized_shape[0] for m in mixer.children() if isinstance(m, nn.RMSNorm) and m.weight is None]
    named = [getattr(mixer, name, None) for name in ("v_head_dim", "head_v_dim", "head_dim")]
    width = next((w for w in (*joined, *named) if isinstance(w, int) and w > 0 and neurons % w == 0), None)
    if width is not None:
        return neurons // width
    return config.num_attention_heads if neurons % config.num_attention_heads == 0 else 0


def _router(block: nn.Module, experts: nn.Module) -> nn.Module | None:
    """The module beside the experts whose one matrix (a bias may be of shape [1, E]) has a row for each of them."""
    for module in block.children():
        matrices = [p for p in module.parameters() if p.dim() > 1 and len(p) > 1]
        if module is not experts and len(matrices) == 1 and len(matrices[0]) == len(experts.down_proj):
            return module
    return None


def _require_readable(name: str, model: nn.Module, sites: list[Site]) -> None:
    if not sites:
        raise DecompositionError(
            f"{name}: no matrix that writes to the residual stream was found (error: all of it); not supported"
        )
    if any(p.is_meta for p in model.parameters()):
        raise DecompositionError(f"{name}: weights are offloaded; load the model without CPU or disk offload")
    for site in sites:
        dtype = site.stored(0).dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise DecompositionError(
                f"{name}: layer {site.layer}: {site.name} is packed ({dtype}); load the weights dequantised"
            )


class _Recorder:
    """Hooks that copy the last position of each prompt out of a forward pass."""

    def __init__(self, length: int, positions: Tensor, oddities: list[str]):
        self.oddities, self.returns, self.normalises = oddities, {}, {}
        self.rows, self.positions = torch.arange(len(positions), device=positions.device), positions
        self.flat = self.rows * length + positions  # experts and routers see all tokens in one row each

    def take(self, x: Tensor) -> Tensor:
        x = x[self.rows.to(x.device), self.positions.to(x.device)] if x.dim() == 3 else x[self.flat.to(x.device)]
        return x.detach().float()

    def hook(self, index: int, layer: nn.Module, record: LayerTrace, sites: list[Site]) -> list:
        """Register the hooks of one layer; the caller removes them."""
        norms: list[tuple[Tensor, Tensor]] = []  # (input, output) of the norms that ran so far
        written: dict[str, Tensor] = {}  # what the branches put out
        multiplier = multiplier_of(layer)

        def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
            record.residual_in = self.take(hidden_of(args, kwargs))

        def leave(_: nn.Module, __: tuple, output: object) -> None:
            record.residual_out = self.take(first_of(output))
            if isinstance(output, tuple):
                self.returns[index] = len(output)
            for name, gate in record.gates.items():
                record.coefficients[name] = record.coefficients[name] * gate
            for site in sites:
                c, factor = record.coefficients.get(site.name), record.factors.get(site.branch)
                if c is not None and factor is not None:
                    record.coefficients[site.name] = c * (factor if c.dim() == 2 else factor[..., None])
            norms.clear()
            written.clear()

        handles = [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave),
        ]
        readers = {s.branch: _reader(layer, s) for s in sites}
        for name, child in layer.named_children():
            if name in readers:
                read = self._read(record, name, norms)
                handles.append(readers[name].register_forward_pre_hook(read, with_kwargs=True))
                handles.append(child.register_forward_hook(self._written(record, name, written, multiplier)))
            elif "norm" in type(child).__name__.lower():
                handles.append(child.register_forward_hook(self._normed(record, norms, written, sites, multiplier)))
        for site in sites:
            handles += self._hook_experts(site, record) if site.kind == "routed" else self._hook_linear(site, record)
        return handles

    def _read(self, record: LayerTrace, branch: str, norms: list) -> Callable:
        def read(_: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = hidden_of(args, kwargs)
            # the branch reads a norm's output: its base residual is what that norm was given
            record.bases[branch] = self.take(next((x for x, y in norms if y is hidden), hidden))

        return read

    def _written(self, record: LayerTrace, branch: str, written: dict[str, Tensor], multiplier: float) -> Callable:
        def put_out(_: nn.Module, __: tuple, output: object) -> None:
            written[branch] = first_of(output)
            record.factors[branch] = torch.full((len(self.rows), 1), multiplier, device=written[branch].device)

        return put_out

    def _normed(
        self, record: LayerTrace, norms: list, written: dict[str, Tensor], sites: list[Site], multiplier: float
    ) -> Callable:
        def normed(module: nn.Module, args: tuple, output: Tensor) -> None:
            norms.append((args[0], output))
            branch = next((name for name, y in written.items() if y is args[0]), None)
            if branch is not None:  # a norm behind a branch
                y = self.take(args[0])
                norm = Norm.of(module, y[0])
                if norm.centred or norm.bias.any():
                    self.oddities.append(
                        f"the norm behind {branch} of layer {sites[0].layer} centres or shifts what it wrote"
                    )
                    return
                record.factors[branch], record.outputs[branch] = multiplier * norm.scale(y)[:, None].float(), y
                for site in sites:
                    site.norm = norm if site.branch == branch else site.norm

        return normed

    def _hook_linear(self, site: Site, record: LayerTrace) -> list:
        def coefficients(_: nn.Module, args: tuple) -> None:
            record.coefficients[site.name] = self.take(args[0])

        def gate(_: nn.Module, __: tuple, output: Tensor) -> None:
            record.gates[site.name] = torch.sigmoid(self.take(output))

        handles = [site.module.register_forward_pre_hook(coefficients)]
        return handles if site.gate is None else [*handles, site.gate.register_forward_hook(gate)]

    def _hook_experts(self, site: Site, record: LayerTrace) -> list:
        def coefficients(module: nn.Module, args: tuple) -> None:
            hidden, index, weight = (self.take(x) for x in args)
            record.index, order = index.long().sort(dim=1)
            record.weight = weight.gather(1, order)
            record.coefficients[site.name] = routed_coefficients(module, hidden, record.index, record.weight)

        def said(router: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            if not (isinstance(output, tuple) and len(output) >= 3):  # (logits, weights, indices)
                return
            record.router = self.take(output[0])
            # of a router that is sure of its choice, probabilities add up to 1 too; of nothing it cannot be sure
            # (asked past whatever an intervention put in the place of its forward pass: this is the family's rule)
            of_nothing = type(router).forward(router, torch.zeros_like(args[0][:1]), *args[1:], **kwargs)
            self.normalises[site.layer] = sums_are_equal(torch.cat([output[1], of_nothing[1]]))

        handles = [site.module.register_forward_pre_hook(coefficients)]
        return handles if site.router is None else [*handles, site.router.register_forward_hook(said, with_kwargs=True)]


def _reader(layer: nn.Module, site: Site) -> nn.Module:
    """What reads the stream for a site: its branch, or, where the branch is the matrix itself (OPT), the matrix beside
    it that computes its neurons."""
    if site.name != site.branch:
        return layer.get_submodule(site.branch)
    wide = (m for m in layer.children() if isinstance(m, nn.Linear) and m.out_features == site.neurons)
    return next((m for m in wide if m is not site.module), site.module)


def hidden_of(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states that a module is called with."""
    return args[0] if args else kwargs["hidden_states"]
