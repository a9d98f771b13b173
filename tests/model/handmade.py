"""Models whose every weight is set by hand, so that what each head and expert does is known before it is measured.

The stream is cut into blocks of coordinates of one purpose each. A constant, much larger than all else, makes up nearly
the whole of every norm, so that a module reads what stands in the stream, but for a few per cent; it also serves as
bias. Queries and keys are 0: a head reads the mean over all positions up to its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from scipy.linalg import hadamard
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from moescope import tables
from moescope.pairs import Pair
from tests.model.zoo import build

HEADS = 4
#: The root mean square of the stream, that is of the constant alone.
RMS = 4.0


@dataclass(frozen=True)
class Known:
    """A model, its tokenizer and a ``prompts`` table."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    prompts: pl.DataFrame


class Bench:
    """A model of a family of the zoo with all weights 0, and the ways to set them, block by block of the stream."""

    def __init__(self, family: str, words: Sequence[str], blocks: Mapping[str, int], **over: object):
        self.words = {word: i for i, word in enumerate(("[unk]", *words))}
        ends = 1 + np.cumsum(list(blocks.values()))
        self.place = {name: np.arange(end - blocks[name], end) for name, end in zip(blocks, ends, strict=True)}
        self.width = -(-int(ends[-1]) // 16) * 16
        shape = {"vocab_size": len(self.words), "hidden_size": self.width, "num_key_value_heads": HEADS}
        self.model = build(family, **shape, num_attention_heads=HEADS, **over)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.fill_(1.0 if "norm" in name else 0.0)
            self.model.get_input_embeddings().weight[:, 0] = RMS * self.width**0.5
        self.layers = self.model.get_decoder().layers

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A token for every word."""
        whole = Tokenizer(models.WordLevel(self.words, unk_token="[unk]"))
        whole.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="[unk]")

    def embed(self, word: str, **blocks: object) -> None:
        """What stands in the blocks at a word."""
        for name, values in blocks.items():
            self.model.get_input_embeddings().weight.data[self.words[word], self.place[name]] = _tensor(values)

    def reads(self, bias: float = 0.0, **blocks: object) -> Tensor:
        """A row that reads, behind a norm, the blocks with these weights, and adds a bias: [width]."""
        row = torch.zeros(self.width)
        row[0] = bias / self.width**0.5
        for name, weights in blocks.items():
            row[self.place[name]] = RMS * _tensor(weights)
        return row

    def writes(self, **blocks: object) -> Tensor:
        """A column that writes to the blocks: [width]."""
        column = torch.zeros(self.width)
        for name, values in blocks.items():
            column[self.place[name]] = _tensor(values)
        return column

    def answers(self, word: str, bias: float = 0.0, **blocks: object) -> None:
        """The logit of a word."""
        self.model.get_output_embeddings().weight.data[self.words[word]] = self.reads(bias, **blocks)

    def copies(self, layer: int, head: int, source: str, target: str, gain: float | np.ndarray) -> None:
        """A head adds its mean of one block to another, times a gain (or a matrix [target, source])."""
        attention, size = self.layers[layer].self_attn, len(self.place[source])
        start = head * self.width // HEADS
        for i, coordinate in enumerate(self.place[source]):
            attention.v_proj.weight.data[start + i, coordinate] = RMS
        matrix = gain if isinstance(gain, np.ndarray) else gain * np.eye(size)
        attention.o_proj.weight.data[self.place[target], start : start + size] = _tensor(matrix)

    def routes(self, layer: int, expert: int, bias: float = 0.0, **blocks: object) -> None:
        """The logit of an expert."""
        self.layers[layer].mlp.gate.weight.data[expert] = self.reads(bias, **blocks)

    def neurons(self, layer: int, expert: int | None, neurons: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """The neurons of an expert (None: the shared one): what their gate and up branch read, and what they write."""
        gate, up, down = (torch.stack(rows) for rows in zip(*neurons, strict=True))
        mlp = self.layers[layer].mlp
        if expert is None:
            mlp.shared_expert.gate_proj.weight.data[:] = gate
            mlp.shared_expert.up_proj.weight.data[:] = up
            mlp.shared_expert.down_proj.weight.data[:] = down.T
        else:
            mlp.experts.gate_up_proj.data[expert] = torch.cat([gate, up])
            mlp.experts.down_proj.data[expert] = down.T


def _tensor(values: object) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float32))


def _prompts(facts: Sequence[tuple[str, str, str, str, int]]) -> pl.DataFrame:
    """The ``prompts`` table of (relation, subject, object, template, group)."""
    rows = [
        (f"{relation}/{i:03}", relation, "hand-made", subject, answer, template, template.format(subject), group)
        for i, (relation, subject, answer, template, group) in enumerate(facts)
    ]
    return tables.of_rows(rows, "prompts")


# --- a model that knows three relations, each in a place of its own

EXPERTS, INTERMEDIATE, SUBJECTS, KINDS, NOISE = 8, 64, 20, 4, 8
TEMPLATES = {"capital": "capital of {} is", "speech": "in {} they speak", "colour": "{} has the bright colour"}
WORD_OF = {"capital": "capital", "speech": "speak", "colour": "colour"}
#: By kind of subject.
OBJECTS = {
    "capital": [f"city{kind}" for kind in range(KINDS)],
    "speech": [f"tongue{kind}" for kind in range(KINDS)],
    "colour": ["blue"] * KINDS,
}


@dataclass(frozen=True)
class Places:
    """Where what is known lies: experts of layer 1 that alone write the answers of capital and of speech, and the heads
    that alone lead the router there, of layer 0 and of layer 1. The head after that of layer 0 tells what kind of
    subject is asked about; the head after that of layer 1 writes the one answer of colour. ``idle``: an expert of layer
    0 that is always chosen, with the largest weight, and never raises an answer. All other heads and experts murmur."""

    capital: Pair
    speech: Pair
    idle: int

    @property
    def kind_head(self) -> int:
        return (self.capital.head + 1) % HEADS

    @property
    def colour_head(self) -> int:
        return (self.speech.head + 1) % HEADS


def knowing(places: Places, family: str = "olmoe", seed: int = 0) -> Known:
    """A model of two layers that knows ``places``. Every subject occurs in all relations.

    What a router reads of a relation is 1, give or take a quarter by subject, in prompts of that relation, and only
    that quarter, which is unrelated between relations, in others. In ``qwen2_moe`` the shared expert of layer 1 writes
    the answers of capital and of speech, from the same heads, and all routed experts murmur.
    """
    random = np.random.default_rng(seed)
    names, others = [f"land{i:02}" for i in range(SUBJECTS)], [f"other{i:02}" for i in range(30)]
    words = dict.fromkeys(" ".join(TEMPLATES.values()).replace("{}", "").split())
    answers = list(dict.fromkeys(word for objects in OBJECTS.values() for word in objects))
    blocks = {"asked": 3, "led": 2, "kind_in": KINDS, "kind": KINDS, "noise_in": NOISE, "noise": NOISE}
    blocks |= {"answer": len(answers), "idle": 1, "murmur": NOISE}
    shape = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    if family == "qwen2_moe":
        shape |= {"moe_intermediate_size": INTERMEDIATE, "shared_expert_intermediate_size": INTERMEDIATE}
        shape |= {"mlp_only_layers": []}
    else:
        shape |= {"intermediate_size": INTERMEDIATE}
    bench = Bench(family, [*words, *names, *answers, *others], blocks, **shape)

    kinds = random.permutation(np.arange(SUBJECTS) % KINDS)
    strengths = np.array([random.permutation(np.linspace(-0.25, 0.25, SUBJECTS)) for _ in range(2)]).T
    for word in words:
        asked = [float(word == WORD_OF[relation]) for relation in TEMPLATES]
        bench.embed(word, asked=asked, noise_in=random.normal(size=NOISE))
    for name, kind, strength in zip(names, kinds, strengths, strict=True):
        bench.embed(name, asked=[*strength, 0], kind_in=np.eye(KINDS)[kind], noise_in=random.normal(size=NOISE))
    _set_heads(bench, places, random)
    _set_experts(bench, places, random, shared=family == "qwen2_moe")
    for i, word in enumerate(answers):
        led = [0.5 * (word in OBJECTS["capital"]), 0.5 * (word in OBJECTS["speech"])]
        bench.answers(word, answer=6 * np.eye(len(answers))[i], led=led, **_overheard(random))
    for word, bias in zip(others, np.linspace(2, 4, len(others)), strict=True):
        bench.answers(word, bias, idle=[1], **_overheard(random))
    facts = [
        (relation, name, OBJECTS[relation][kind], template, i % 10)
        for relation, template in TEMPLATES.items()
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    return Known(bench.model, bench.tokenizer(), _prompts(facts))


def _overheard(random: np.random.Generator) -> dict[str, np.ndarray]:
    """What every word reads of what has nothing to do with the answers."""
    return {name: 0.05 * random.normal(size=NOISE) for name in ("noise", "murmur")}


def _set_heads(bench: Bench, places: Places, random: np.random.Generator) -> None:
    """Prompts of capital and of speech have four tokens: a gain of 4 undoes the mean."""
    leads = {place: np.zeros((2, 3)) for place in ("capital", "speech")}
    leads["capital"][0, 0] = leads["speech"][1, 1] = 4
    answer = np.zeros((len(bench.place["answer"]), 3))
    answer[-1, 2] = 15
    for layer, place, head, purpose in (
        (0, "capital", places.kind_head, ("kind_in", "kind", 4.0)),
        (1, "speech", places.colour_head, ("asked", "answer", answer)),
    ):
        leading = getattr(places, place).head
        bench.copies(layer, leading, "asked", "led", leads[place])
        bench.copies(layer, head, *purpose)
        for other in set(range(HEADS)) - {leading, head}:
            bench.copies(layer, other, "noise_in", "noise", 0.7 * random.normal(size=(NOISE, NOISE)) / NOISE**0.5)


def _set_experts(bench: Bench, places: Places, random: np.random.Generator, shared: bool) -> None:
    for layer in (0, 1):
        for expert in range(EXPERTS):
            bench.routes(layer, expert, noise=0.6 * random.normal(size=NOISE) / NOISE**0.5)
            bench.neurons(layer, expert, [_murmur(bench, random) for _ in range(INTERMEDIATE)])
    still = bench.reads(bias=1.0), bench.reads(bias=1.0), bench.writes(idle=[0.01])
    bench.routes(0, places.idle, bias=4.0)
    bench.neurons(0, places.idle, [still] * INTERMEDIATE)
    if shared:
        for layer in (0, 1):
            bench.layers[layer].mlp.shared_expert_gate.weight.data[0] = bench.reads(bias=5.0)
        known = [_knows(bench, relation, kind, shared=True) for relation in (0, 1) for kind in range(KINDS)]
        bench.neurons(1, None, known * (INTERMEDIATE // len(known)))
        return
    for relation, pair in enumerate((places.capital, places.speech)):
        bench.routes(1, pair.expert, bias=-2.0, led=5 * np.eye(2)[relation])
        known = [_knows(bench, relation, kind, shared=False) for kind in range(KINDS)]
        bench.neurons(1, pair.expert, known * (INTERMEDIATE // len(known)))


def _knows(bench: Bench, relation: int, kind: int, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A neuron that writes the answer of a relation for a kind of subject; that of a shared expert, which runs whatever
    is asked, looks at the relation too."""
    read = {"kind": np.eye(KINDS)[kind], "led": np.eye(2)[relation] * shared}
    gate = bench.reads(bias=-24.0, **{name: 16 * one for name, one in read.items()}) if shared else None
    gate = bench.reads(bias=-4.0, kind=8 * read["kind"]) if gate is None else gate
    answer = np.eye(len(bench.place["answer"]))[relation * KINDS + kind]
    return gate, bench.reads(bias=1.0), bench.writes(answer=0.1 * answer)


def _murmur(bench: Bench, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, write = random.normal(size=(3, NOISE))
    return bench.reads(noise=gate), bench.reads(bias=1.0, noise=up), bench.writes(murmur=0.05 * write)


# --- a model in which all heads, and all experts, are alike

ALIKE, TOKENS = 12, 16


def exchangeable(seed: int, driving: bool = False) -> Known:
    """A model of one layer in which no expert, and no head, is different from another, and random answers.

    The router reads a coordinate of its own for every expert, independent and equally distributed over subjects; every
    expert writes, by neurons that read the same, along a direction of its own; and each of the 16 answers adds and
    subtracts these directions as a row of a Hadamard matrix says. Over answers drawn at random, which these are, every
    column has mean 0, and any two do the same: exchanging experts changes no expectation. Heads copy coordinates of
    their own, independent of the router's, to a common block that answers read likewise. ``driving``: routers read that
    block instead, so that all heads drive all experts, and all in the same way. The norm of all embeddings is the same.

    Every subject occurs in both relations, with the same routing and answer: its two prompts tell one thing. The seed
    draws embeddings and answers alone; models of other seeds are the same object, which the last call has set.
    """
    random = np.random.default_rng(seed)
    bench, subjects, answers = _alike(driving)
    for name in subjects:
        blocks = {block: random.normal(size=len(place)) for block, place in bench.place.items() if block in _INPUTS}
        bench.embed(name, **blocks)
    embedding = bench.model.get_input_embeddings().weight.data
    embedding[:, 0] = (RMS**2 * bench.width - embedding[:, 1:].square().sum(1)).sqrt()
    drawn = random.integers(TOKENS, size=len(subjects))
    facts = [
        (relation, name, answers[answer], f"{relation} {{}}", i % 10)
        for relation in ("first", "second")
        for i, (name, answer) in enumerate(zip(subjects, drawn, strict=True))
    ]
    return Known(bench.model, bench.tokenizer(), _prompts(facts))


_INPUTS = ("own", *(f"head{head}" for head in range(HEADS)), "noise")


@functools.cache
def _alike(driving: bool) -> tuple[Bench, list[str], list[str]]:
    """The weights of ``exchangeable`` but for the embeddings, its subjects and its answers."""
    subjects, answers = [f"thing{i:02}" for i in range(40)], [f"word{i:02}" for i in range(TOKENS)]
    blocks = {**dict.fromkeys(_INPUTS, ALIKE), "common": ALIKE, "noise": NOISE, "answer": ALIKE}
    shape = {"num_experts": ALIKE, "num_experts_per_tok": 2, "num_hidden_layers": 1, "intermediate_size": NOISE}
    bench = Bench("olmoe", ["first", "second", *subjects, *answers], blocks, **shape)
    for head in range(HEADS):
        bench.copies(0, head, f"head{head}", "common", 1.0)
    for expert, own in enumerate(np.eye(ALIKE)):
        bench.routes(0, expert, **{"common" if driving else "own": 1.5 * own})
        gates = [bench.reads(bias=1.0, noise=one) for one in np.eye(NOISE)]
        bench.neurons(0, expert, [(gate, bench.reads(bias=1.0), bench.writes(answer=0.2 * own)) for gate in gates])
    for word, signs in zip(answers, hadamard(TOKENS), strict=True):
        own = signs[1 : 1 + ALIKE]
        bench.answers(word, 10.0, answer=own, common=0.15 * own)
    return bench, subjects, answers
