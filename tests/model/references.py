"""References for what the library does to a model, written against transformers alone: no code of ours is called."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# ---- reading a residual in float64 ---------------------------------------------------------------------------------


class Reader:
    """log p(target) of residuals as a float64 copy of the model reads them: its own final norm, with the statistic that
    another residual has, and its own head with all that it does to logits."""

    def __init__(self, model: nn.Module, decoder: str, norm: str):
        self.model = copy.deepcopy(model).double()
        self.decoder, self.norm = self.model.get_submodule(decoder), self.model.get_submodule(norm)
        size = self.model.get_input_embeddings().weight.shape[1]
        x = torch.randn(1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.bias = self.norm(torch.zeros_like(x))
        self.centres = torch.allclose(self.norm(x + 5), self.norm(x), atol=1e-3)
        # that of OLMo has no name: it is a number in its code
        self.eps = getattr(self.norm, "variance_epsilon", getattr(self.norm, "eps", 1e-5))

    def sigma(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centres else x
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    @torch.no_grad()
    def __call__(self, residuals: Tensor, final: Tensor, target: int) -> Tensor:
        """residuals [n, d], read with the statistic of ``final`` [d]: [n]."""
        x, final = residuals.double(), final.double()
        hidden = (self.norm(x) - self.bias) * self.sigma(x) / self.sigma(final) + self.bias
        out = MoeModelOutputWithPast(last_hidden_state=hidden[:, None])
        out.cross_attentions = out.shared_kv_states = None  # some heads ask for them
        forward = self.decoder.forward
        self.decoder.forward = lambda *args, **kwargs: out
        try:
            logits = self.model(inputs_embeds=hidden[:, None], use_cache=False).logits[:, 0]
        finally:
            self.decoder.forward = forward
        return logits.log_softmax(-1)[:, target]


# ---- a model without some of its parts -----------------------------------------------------------------------------


def without_neurons(model: nn.Module, path: str, neurons: list[int]) -> nn.Module:
    """A copy in which some neurons of a feed-forward matrix at ``path`` are never anything but 0: what computes them is
    zeroed, not what reads them."""
    model = copy.deepcopy(model)
    owner, matrix = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    width = matrix.in_features if isinstance(matrix, nn.Linear) else len(matrix.weight)
    with torch.no_grad():
        for module in owner.children():
            if module is matrix or getattr(module, "weight", None) is None or module.weight.dim() != 2:
                continue
            rows = module.weight if isinstance(module, nn.Linear) else module.weight.T
            if len(rows) not in (width, 2 * width):
                continue
            mine = [
                len(rows) - width + j for j in neurons
            ]  # of a fused gate and up projection, the part after the gate
            rows[mine] = 0
            if module.bias is not None:
                module.bias[mine] = 0
    return model


@dataclass
class Experts:
    """What the slow loop leaves out: experts, or neurons of them, by module."""

    experts: dict[nn.Module, set[int]]
    neurons: dict[nn.Module, dict[int, list[int]]]

    def forward(self, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Position by position, slot by slot."""
        out = torch.zeros_like(hidden)
        for n in range(len(hidden)):
            for e, w in zip(index[n].tolist(), weight[n], strict=True):
                if e in self.experts.get(module, ()):
                    continue
                neurons = _neurons(module, e, hidden[n])
                neurons[self.neurons.get(module, {}).get(e, [])] = 0
                down = module.down_proj[e].T if module.is_transposed else module.down_proj[e]
                written = down @ neurons
                out[n] += w * (written + module.down_proj_bias[e] if module.has_bias else written)
        return out


def _neurons(module: nn.Module, e: int, x: Tensor) -> Tensor:
    """The neurons of one expert for one hidden state, by the formula of its family."""
    if not module.has_gate:
        return module.act_fn(module.up_proj[e] @ x)
    up = module.gate_up_proj[e].T if module.is_transposed else module.gate_up_proj[e]
    z = up @ x
    if module.has_bias:
        z = z + module.gate_up_proj_bias[e]
    if module.is_concatenated:
        gate, linear = z.chunk(2)
        return module.act_fn(gate) * linear
    gate, linear = z[0::2].clamp(max=7.0), z[1::2].clamp(-7.0, 7.0)  # gpt_oss
    return (linear + 1) * gate * torch.sigmoid(1.702 * gate)


@contextlib.contextmanager
def slow_experts(model: nn.Module, left_out: Experts) -> Iterator[None]:
    """Run the experts of a model by the slow loop."""
    before = model.config._experts_implementation
    ALL_EXPERTS_FUNCTIONS.register("slow_loop", left_out.forward)
    model.set_experts_implementation("slow_loop")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextlib.contextmanager
def silent_heads(module: nn.Module, heads: list[int]) -> Iterator[list[bool]]:
    """Attention in which some heads of one module give 0, where the family calls attention by name. The list that is
    given fills as it is called."""
    called: list[bool] = []
    known = dict(ALL_ATTENTION_FUNCTIONS.items())

    def silenced(function: Callable) -> Callable:
        def attend(who: nn.Module, *args: object, **kwargs: object) -> tuple:
            out, *rest = function(who, *args, **kwargs)
            if who is module:
                called.append(True)
                out = out.clone()
                out[:, :, heads] = 0  # [B, T, heads, width]
            return out, *rest

        return attend

    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    for name, function in {**known, **({"eager": own} if own else {})}.items():
        ALL_ATTENTION_FUNCTIONS.register(name, silenced(function))
    try:
        yield called
    finally:
        for name, function in known.items():
            ALL_ATTENTION_FUNCTIONS.register(name, function)
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("eager", None)


# ---- routers, by hand ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How a family routes. ``score``: softmax, sigmoid, or ``chosen`` (top k of the logits, then ``then`` over those).
    ``groups``: by the ``sum`` of the two largest or the ``max`` of each group, the others count for ``outside``."""

    score: str = "softmax"
    then: str = "softmax"
    normalised: bool = False
    scale: float = 1.0
    groups: str | None = None
    outside: float = -torch.inf


#: The rules of the families, as their papers and configurations state them, for the shapes of the zoo.
RULES = {
    "olmoe": Rule(),
    "olmoe_normed": Rule(normalised=True),
    "flex_olmo": Rule(),
    "mixtral": Rule(normalised=True),
    "qwen2_moe": Rule(),
    "qwen3_moe": Rule(normalised=True),
    "qwen3_next": Rule(normalised=True),
    "deepseek_v2": Rule(scale=2.5, groups="max", outside=0.0),
    "deepseek_v2_lite": Rule(),
    "deepseek_v3": Rule("sigmoid", normalised=True, scale=2.5, groups="sum"),
    "deepseek_v32": Rule("sigmoid", normalised=True, scale=2.5, groups="sum"),
    "glm_moe_dsa": Rule("sigmoid", normalised=True, scale=2.5, groups="sum"),
    "mimo_v2_flash": Rule("sigmoid", normalised=True, scale=2.5, groups="sum"),
    "hy_v3": Rule("sigmoid", normalised=True, scale=2.826),
    "qwen3_5_moe_text": Rule(normalised=True),
    "mellum": Rule(normalised=True),
    "granitemoe_swa": Rule("chosen"),
    "glm4_moe": Rule("sigmoid", normalised=True, scale=2.5, groups="sum"),
    "glm4_moe_lite": Rule("sigmoid", normalised=True, scale=2.5, groups="sum"),
    "dots1": Rule("sigmoid", normalised=False, scale=2.5, groups="sum"),
    "solar_open": Rule("sigmoid", normalised=True, scale=2.5, groups="sum"),
    "exaone_moe": Rule("sigmoid", normalised=True, scale=2.5),
    "gpt_oss": Rule("chosen"),
    "granitemoe": Rule("chosen"),
    "granitemoeshared": Rule("chosen"),
    "granitemoehybrid": Rule("chosen"),
    "ernie4_5_moe": Rule(normalised=True),
    "hunyuan_v1_moe": Rule(normalised=True),
    "minimax_m2": Rule("sigmoid", normalised=True),
    "jamba": Rule(),
    "lfm2_moe": Rule("sigmoid", normalised=True),
    "nemotron_h": Rule("sigmoid", normalised=True),
    "afmoe": Rule("sigmoid", normalised=True),
    "cohere2_moe": Rule("chosen"),
    "cohere2_moe_sigmoid": Rule("chosen", then="sigmoid", normalised=True),
}


def route(
    rule: Rule, logits: Tensor, correction: Tensor, k: int, blocked: list[int], how: str
) -> list[dict[int, float]]:
    """The weight of every chosen expert, by position: logits [N, E] float64, correction [E]."""
    return [_route(rule, z, correction, k, blocked if how else [], how) for z in logits]


def _route(rule: Rule, z: Tensor, correction: Tensor, k: int, blocked: list[int], how: str) -> dict[int, float]:
    z, count = z.clone(), len(z)
    if how == "reroute_logit":
        z[blocked] = -torch.inf
    elif how == "min_logit":
        z[blocked] = z.min()
    score = {"softmax": z.softmax(0), "sigmoid": z.sigmoid(), "chosen": z}[rule.score]
    entering = (score + correction).tolist()
    if rule.groups:
        half = count // 2
        groups = [entering[:half], entering[half:]]
        worth = [max(g) if rule.groups == "max" else sum(sorted(g)[-2:]) for g in groups]
        loser = worth.index(min(worth))
        entering[loser * half : (loser + 1) * half] = [rule.outside] * half
    if how in ("reroute", "min_logit"):
        for e in blocked:
            entering[e] = -torch.inf
    chosen = sorted(range(count), key=lambda e: -entering[e])[:k]
    weight = score[chosen]
    if rule.score == "chosen":
        weight = weight.softmax(0) if rule.then == "softmax" else weight.sigmoid()
    if rule.normalised:
        weight = weight / weight.sum()
    weight = weight * rule.scale
    if how == "zero_weight":
        weight = torch.stack([w * (e not in blocked) for e, w in zip(chosen, weight, strict=True)])
    return dict(zip(chosen, weight.tolist(), strict=True))


def sparsemixer(z: Tensor, blocked: list[int], how: str, jitter: float) -> dict[int, float]:
    """Phi-MoE: the best expert by a softmax over those within reach of it, then the second best by one without it."""
    z, weight = z.clone(), {}
    if how == "reroute_logit":
        z[blocked] = -torch.inf
    elif how == "min_logit":
        z[blocked] = z.min()
    alive = [e for e in range(len(z)) if z[e] > -torch.inf]
    for _ in range(2):
        best = max(alive, key=lambda e: z[e].item())
        within = [e for e in alive if (z[best] - z[e]) / max(z[e].abs(), z[best]) <= 2 * jitter]
        weight[best] = F.softmax(z[within], 0)[within.index(best)].item()
        alive.remove(best)
    return {e: w * (how != "zero_weight" or e not in blocked) for e, w in weight.items()}
