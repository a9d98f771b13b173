"""Models run one prompt at a time, with routers and heads changed by hand: what the experiments on experts are held to.

Written against transformers alone, for families whose feed-forward part is an ``mlp`` with ``gate`` and ``experts``; no
code of ours is called.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import polars as pl
import torch
from torch import Tensor, nn

from tests.model import models, references
from tests.model.zoo import ZOO

#: Softmax without and with normalisation, a shared expert behind a gate and a dense layer, sigmoid with a correction
#: and groups; attention with values of a width of their own.
FAMILIES = ["olmoe", "olmoe_normed", "mixtral", "qwen2_moe", "glm4_moe", "deepseek_v3"]


def build(name: str, experts: int = 12, slots: int = 3, **over: object) -> nn.Module:
    """A model of the zoo with more experts, so that ten of them can be blocked."""
    count = next(key for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in ZOO[name])
    return models.build(name, **{count: experts, "num_experts_per_tok": slots, **over})


def prompts() -> pl.DataFrame:
    """Two relations ask the same questions, so that prompts of both are equal, and two more begin like each other; of
    each, subjects in both folds; several lengths."""
    spain = (pl.col("subject") == "the Kingdom of Spain in Europe") & pl.col("relation").str.starts_with("capital")
    some = models.prompts(2).filter(pl.col("subject").is_in(["France", "Italy"]) | spain)
    return some.with_columns(group=pl.col("subject").replace_strict({"France": 1, "Italy": 7}, default=3))


@dataclass
class Seen:
    """One prompt of T tokens: ``logits`` [V] at its last position; by layer, what it reads (``hidden`` [T, d]) and what
    its heads put out (``heads`` [T, n]); by layer that routes, ``router`` [T, E], what experts are ``given`` [T, d],
    ``index`` and ``weight`` [T, K]."""

    logits: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    router: dict[int, Tensor] = field(default_factory=dict)
    given: dict[int, Tensor] = field(default_factory=dict)
    index: dict[int, Tensor] = field(default_factory=dict)
    weight: dict[int, Tensor] = field(default_factory=dict)

    def score(self, target: int) -> Score:
        return Score.of(self.logits, target)


@dataclass
class Score:
    """log p of the target, and the ranks that it may have, logits nearer than rounding being equal."""

    log_prob: float
    ranks: range

    @classmethod
    def of(cls, logits: Tensor, target: int) -> Score:
        off = logits - logits[target]
        ranks = range(1 + int((off > 1e-4).sum()), 1 + int((off > -1e-4).sum()))
        return cls(logits.double().log_softmax(-1)[target].item(), ranks)


def blocks(model: nn.Module) -> dict[int, nn.Module]:
    """The mixtures of experts, by layer."""
    return {i: layer.mlp for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}


@torch.no_grad()
def run(model: nn.Module, tokens: tuple[int, ...]) -> Seen:
    """The model on one prompt."""
    seen, hooks = Seen(), []

    def read(layer: int, args: tuple, kwargs: dict) -> None:
        seen.hidden[layer] = (args[0] if args else kwargs["hidden_states"])[0]

    def put_out(layer: int, args: tuple) -> None:
        seen.heads[layer] = args[0][0]

    def said(layer: int, output: tuple) -> None:
        seen.router[layer] = output[0]

    def used(layer: int, args: tuple) -> None:
        seen.given[layer], seen.index[layer], seen.weight[layer] = args

    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_pre_hook(lambda m, a, k, i=i: read(i, a, k), with_kwargs=True))
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, i=i: put_out(i, a)))
    for i, block in blocks(model).items():
        hooks.append(block.gate.register_forward_hook(lambda m, a, out, i=i: said(i, out)))
        hooks.append(block.experts.register_forward_pre_hook(lambda m, a, i=i: used(i, a)))
    seen.logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return seen


#: (layer, its router's logits [T, E] in float64) -> the weight of every expert that is used, by position.
Decide = Callable[[int, Tensor], list[Mapping[int, float]]]


@contextlib.contextmanager
def routed_by(model: nn.Module, decide: Decide) -> Iterator[None]:
    """Routers whose forward pass is a rule of the test's own."""

    def forward(layer: int, gate: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = hidden.flatten(0, -2).double() @ gate.weight.detach().double().T
        choice = decide(layer, z)
        index = torch.tensor([list(one) for one in choice])
        return z.float(), torch.tensor([list(one.values()) for one in choice], dtype=torch.float32), index

    replaced = blocks(model).items()
    for layer, block in replaced:
        block.gate.forward = lambda hidden, layer=layer, gate=block.gate: forward(layer, gate, hidden)
    try:
        yield
    finally:
        for _, block in replaced:
            del block.gate.forward


def correction(block: nn.Module) -> Tensor:
    """What a family adds to the scores that enter the choice: [E]."""
    bias = getattr(block.gate, "e_score_correction_bias", None)
    return torch.zeros(len(block.gate.weight), dtype=torch.float64) if bias is None else bias.double()


def without_shared(model: nn.Module) -> nn.Module:
    """A copy whose shared experts write nothing."""
    model = copy.deepcopy(model)
    for block in blocks(model).values():
        shared = getattr(block, "shared_expert", None) or block.shared_experts
        shared.down_proj.weight.detach().zero_()
    return model


def without_head(model: nn.Module, layer: int, head: int) -> nn.Module:
    """A copy in which nothing reads what a head puts out (all models here have four heads)."""
    model = copy.deepcopy(model)
    matrix = model.model.layers[layer].self_attn.o_proj.weight.detach()
    matrix.unflatten(1, (4, -1))[:, head] = 0
    return model


def probability(name: str, router: Tensor) -> Tensor:
    """What a family makes of its router's logits."""
    return router.softmax(-1) if references.RULES[name].score == "softmax" else router.sigmoid()


def expert(experts: nn.Module, number: int, hidden: Tensor) -> Tensor:
    """What an expert makes of hidden states [T, d]."""
    gate, up = (hidden @ experts.gate_up_proj[number].T).chunk(2, -1)
    return (experts.act_fn(gate) * up) @ experts.down_proj[number].T


def untouched(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def exact(model: nn.Module) -> nn.Module:
    """A float64 copy, in which gradients go through every expert."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")
    return model
