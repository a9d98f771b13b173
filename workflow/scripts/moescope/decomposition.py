"""Exact per-neuron decomposition of the residual stream.

A *site* is one matrix that writes to the residual stream: the attention output, a dense or shared feed-forward down
projection, or the fused experts. Neuron i of a site has a coefficient c_i (the i-th input of that matrix, with the
router's or the shared expert's gate where there is one) and a value v_i (its i-th column). In a pre-norm layer

    h_out = h_in + sum over sites of (sum_i c_i v_i + bias)

Where a norm stands behind a branch (OLMo-2, Gemma-2), what the branch puts out, y, is multiplied by gain / rms(y): the
gain goes into the values, 1 / rms(y), as it was measured, into the coefficients. So does a multiplier of the residual
(Granite). Such a contribution is exact as a share of what was written; taking a neuron away would change rms(y) too.

Modules are found by shape and name suffix, the residual a branch reads by tensor identity during the forward pass, and
``Trace.error`` compares the sum with what the layer really wrote, so a model that does not fit is refused, not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moescope import scratch
from moescope.errors import MoescopeError
from moescope.norms import Norm

#: Names of the matrices that write to the stream, over all families of transformers.
WRITERS = {"o_proj", "out_proj", "dense", "c_proj", "wo", "down_proj", "dense_4h_to_h", "fc2", "w2", "output_linear"}
MIXER = re.compile(r"attn|attention|mamba|conv|mixer", re.IGNORECASE)
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


def _is_experts(module: nn.Module) -> bool:
    """A fused experts module of transformers 5 (its decorator sets ``is_transposed``)."""
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, Tensor) and weight.dim() == 3 and hasattr(module, "is_transposed")


def _first(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclass(eq=False)
class Site:
    """One matrix that writes to the residual stream.

    ``kind`` is attn, dense, shared or routed; ``branch`` the child of the layer it lives in; ``gate`` a module whose
    sigmoid scales the whole site (Qwen's shared expert); ``heads`` the number of heads of an attention site.
    """

    layer: int
    kind: str
    name: str
    module: nn.Module
    block: nn.Module
    gate: nn.Module | None = None
    heads: int = 0
    #: gain [hidden] of a norm behind the branch, as found in a forward pass; None where there is none
    gain: Tensor | None = None
    #: where values are handed out: that of the unembedding, where a model is spread over several GPUs
    device: torch.device | None = None

    @property
    def branch(self) -> str:
        return self.name.split(".")[0]

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
        return written if self.gain is None else written.float() * self.gain.to(self.device)


@dataclass
class LayerTrace:
    """What one layer did at the last position of P prompts (float32).

    ``residual_in``, ``residual_out`` [P, hidden]; ``bases`` the residual each branch reads, [P, hidden];
    ``coefficients`` [P, n] per site, [P, K, I] for routed experts; ``index`` and ``weight`` [P, K] the routed experts
    in ascending order and the weights really used; ``probability`` [P, E] the router's, before the choice of the top
    k; ``gates`` [P, 1] of gated sites; ``factors`` [P, 1] what the output of a branch is multiplied with, the same for
    all its neurons (1 in most models).
    """

    residual_in: Tensor | None = None
    residual_out: Tensor | None = None
    bases: dict[str, Tensor] = field(default_factory=dict)
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    index: Tensor | None = None
    weight: Tensor | None = None
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

    Raises DecompositionError where no site is found, or where weights are offloaded (they could not be read).
    """

    def __init__(self, model: nn.Module):
        self.model = model
        config = model.config.get_text_config()
        self.layers = layers_of(model)
        self.sites = [site for i, layer in enumerate(self.layers) for site in _sites(i, layer, config)]
        self.norm = _final_norm(model)
        self.head = model.get_output_embeddings()
        for site in self.sites:
            site.device = self.device
        name = type(model).__name__
        if not self.sites:
            raise DecompositionError(f"{name}: no matrix that writes to the residual stream was found; not supported")
        if any(p.is_meta for p in model.parameters()):
            raise DecompositionError(f"{name}: weights are offloaded; load the model without CPU or disk offload")

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def require_plain(self, what: str) -> None:
        """Raises DecompositionError where branches are scaled before they are added to the stream: ``what`` (a study)
        takes a neuron's contribution for what is added."""
        scaled = any(getattr(layer, "residual_multiplier", 1.0) != 1.0 for layer in self.layers)
        if scaled or any(site.gain is not None for site in self.sites):
            raise DecompositionError(
                f"{type(self.model).__name__}: a norm or a multiplier stands behind its branches, which {what} does "
                "not support; leave the series out (studies)"
            )

    def at(self, layer: int, *kinds: str) -> list[Site]:
        """The sites of one layer, of some kinds or of all."""
        return [s for s in self.sites if s.layer == layer and (not kinds or s.kind in kinds)]

    @torch.no_grad()
    def trace(self, batches: list[tuple[Tensor, Tensor, Tensor]]) -> Trace:
        """Run batches of (prompt rows [B], input ids [B, T], attention mask [B, T]) and record the last positions."""
        total = sum(len(rows) for rows, _, _ in batches)
        trace = Trace(self, [LayerTrace() for _ in self.layers])
        for rows, ids, mask in batches:
            final, logits, layers = self._run(ids, mask)
            trace.final = _placed(trace.final, rows, total, final)
            trace.logits = _placed(trace.logits, rows, total, logits)
            for whole, part in zip(trace.layers, layers, strict=True):
                whole.scatter(rows, total, part)
        return trace

    def _run(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, list[LayerTrace]]:
        positions = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)  # right for left, right and no padding
        recorder = _Recorder(ids.shape[1], positions)
        layers = [LayerTrace() for _ in self.layers]
        final: list[Tensor] = []
        handles = [self.norm.register_forward_pre_hook(lambda m, a: final.append(recorder.take(a[0])))]
        for i, (layer, record) in enumerate(zip(self.layers, layers, strict=True)):
            handles += recorder.hook(layer, record, self.at(i))
        router = {"output_router_logits": False} if hasattr(self.model.config, "output_router_logits") else {}
        try:
            out = self.model(ids, attention_mask=mask, use_cache=False, logits_to_keep=positions[:, None], **router)
        finally:
            for handle in handles:
                handle.remove()
        return final[-1], out.logits[:, 0].float(), layers


@dataclass
class Trace:
    """The last position of every prompt: per layer what was written, ``final`` [P, d] the residual before the final
    norm, ``logits`` [P, V] the model's own."""

    decomposition: Decomposition
    layers: list[LayerTrace]
    final: Tensor | None = None
    logits: Tensor | None = None

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

    def branch_write(self, layer: int, branch: str) -> Tensor:
        """Everything that a branch of a layer (its A or F) adds to the stream: [P, hidden]."""
        return sum(self.write(s) for s in self.decomposition.at(layer) if s.branch == branch)

    @torch.no_grad()
    def error(self) -> float:
        """Largest |h_in + contributions - h_out| of any layer, relative to max |h_out - h_in| of that layer."""
        worst = 0.0
        for i, record in enumerate(self.layers):
            sites = self.decomposition.at(i)
            if any(s.name not in record.coefficients for s in sites):
                return float("inf")  # a matrix that was found but not called as expected
            update = record.residual_out - record.residual_in
            rebuilt = sum((self.write(s) for s in sites), torch.zeros_like(update))
            size = update.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            error = ((rebuilt - update).abs().max() / size).item()
            worst = max(worst, error if error == error else float("inf"))  # NaN must not pass
        return worst

    def _misread(self) -> bool:
        """Whether some branch was never seen to read the stream itself."""
        hidden = self.final.shape[1]
        bases = [self.layers[s.layer].bases.get(s.branch) for s in self.decomposition.sites]
        return any(base is None or base.shape[1] != hidden for base in bases)

    def verified(self) -> float:
        """The error, or DecompositionError where it exceeds the tolerance: such a model is never scored."""
        name = type(self.decomposition.model).__name__
        error = float("inf") if self._misread() else self.error()
        if not error <= TOLERANCE:
            raise DecompositionError(
                f"{name}: contributions miss the residual stream by {error:.1e} of a layer's update "
                f"(allowed: {TOLERANCE:.0e}); this architecture or these weights are not supported"
            )
        if not all(_softmax_router(record) for record in self.layers if record.index is not None):
            raise DecompositionError(f"{name}: router weights are no shares of a softmax; this router is not supported")
        return error


def _softmax_router(record: LayerTrace) -> bool:
    """Whether the weights really used are the router's softmax, up to one factor per prompt (renormalisation)."""
    if record.probability is None:
        return False
    chosen = record.probability.gather(1, record.index)
    shares = [x / x.sum(1, keepdim=True) for x in (chosen, record.weight)]
    return torch.allclose(*shares, rtol=1e-3, atol=1e-5)


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
    for name, module in layer.named_modules():
        branch, leaf = name.partition(".")[0], name.rpartition(".")[2]
        block = layer.get_submodule(branch) if name else layer
        if _is_experts(module):
            yield Site(index, "routed", name, module, layer.get_submodule(name.rpartition(".")[0]))
        elif leaf in WRITERS and getattr(module, "weight", None) is not None and module.weight.dim() == 2:
            beside_experts = any(_is_experts(m) for m in block.modules())
            if MIXER.search(branch) and not beside_experts:
                owner = layer.get_submodule(name.rpartition(".")[0])
                heads = getattr(owner, "num_v_heads", None) or config.num_attention_heads
                yield Site(index, "attn", name, module, block, heads=heads)
            elif beside_experts:
                yield Site(index, "shared", name, module, block, gate=getattr(block, "shared_expert_gate", None))
            else:
                yield Site(index, "dense", name, module, block)


class _Recorder:
    """Hooks that copy the last position of each prompt out of a forward pass."""

    def __init__(self, length: int, positions: Tensor):
        self.rows, self.positions = torch.arange(len(positions), device=positions.device), positions
        self.flat = self.rows * length + positions  # experts and routers see all tokens in one row each

    def take(self, x: Tensor) -> Tensor:
        x = x[self.rows.to(x.device), self.positions.to(x.device)] if x.dim() == 3 else x[self.flat.to(x.device)]
        return x.detach().float()

    def hook(self, layer: nn.Module, record: LayerTrace, sites: list[Site]) -> list:
        """Register the hooks of one layer; the caller removes them."""
        norms: list[tuple[Tensor, Tensor]] = []  # (input, output) of the norms that ran so far
        written: dict[str, Tensor] = {}  # what the branches put out
        multiplier = float(getattr(layer, "residual_multiplier", 1.0))

        def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
            record.residual_in = self.take(_hidden(args, kwargs))

        def leave(_: nn.Module, __: tuple, output: object) -> None:
            record.residual_out = self.take(_first(output))
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
        branches = {s.branch for s in sites}
        for name, child in layer.named_children():
            if name in branches:
                handles.append(child.register_forward_pre_hook(self._read(record, name, norms), with_kwargs=True))
                handles.append(child.register_forward_hook(self._written(record, name, written, multiplier)))
            elif "norm" in type(child).__name__.lower():
                handles.append(child.register_forward_hook(self._normed(record, norms, written, sites, multiplier)))
        for site in sites:
            handles += self._hook_experts(site, record) if site.kind == "routed" else self._hook_linear(site, record)
        return handles

    def _read(self, record: LayerTrace, branch: str, norms: list) -> Callable:
        def read(_: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = _hidden(args, kwargs)
            # the branch reads a norm's output: its base residual is what that norm was given
            record.bases[branch] = self.take(next((x for x, y in norms if y is hidden), hidden))

        return read

    def _written(self, record: LayerTrace, branch: str, written: dict[str, Tensor], multiplier: float) -> Callable:
        def put_out(_: nn.Module, __: tuple, output: object) -> None:
            written[branch] = _first(output)
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
                    where = f"layer {sites[0].layer}: the norm behind {branch}"
                    raise DecompositionError(f"{where} centres or shifts what it wrote; such a model is not supported")
                record.factors[branch] = multiplier * norm.scale(y)[:, None].float()
                for site in sites:
                    site.gain = norm.gain if site.branch == branch else site.gain

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

        def router(_: nn.Module, __: tuple, output: object) -> None:
            if isinstance(output, tuple) and len(output) >= 3:  # (logits, weights, indices)
                record.probability = self.take(output[0]).softmax(-1)

        handles = [site.module.register_forward_pre_hook(coefficients)]
        others = [m for m in site.block.children() if m is not site.module]
        return handles + [m.register_forward_hook(router) for m in others]


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
