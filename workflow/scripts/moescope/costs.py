"""What jobs cost by the shape of a model and the prompts: operations, hours, memory, disk.

Estimates, by the formulas in the docstrings here; constants were measured.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moescope import expert_sets, facts, manifests, relations, selection

#: Share of the rate of a plain product of 1,024 x 1,024 that scoring reaches (measured on the shape of OLMoE-1B-7B, as
#: all that follows but where it says so).
EFFICIENCY = 0.7
#: Moments that a pair of a prompt and a neuron takes on average.
MOMENTS = 1.6
#: What takes as long as so many operations of a product: to widen a parameter to float32 (2 ns), once a batch; to read
#: it from disk for the first time and check the decomposition, once a job; to form the probability of one token with
#: the write of one head in one prompt.
WIDENING, FIRST, OF_HEAD = 500, 11_500, 2_800
#: Tokens that run for each one of the prompts: where batches are padded, and where equal beginnings run once.
PADDED, DISTINCT = 1.4, 0.75
#: Seconds that do not depend on the size of a model (measured on tiny ones): of a job (imports, loading), of a pass
#: over all prompts in ablation, of an update in training, of the integrated gradients of a pair (13 passes).
JOB, PASS, UPDATE, PATH = 5.0, 0.3, 0.1, 4.0
#: Tokens of a forward batch, and splits into blocks of a masked model: ``clean.BATCH_TOKENS``, ``masking.SEEDS``. Of
#: integrated gradients, prompts held and rows run at once (``coupling``).
BATCH, SPLITS, HELD, ROWS = 4_096, 5, 128, 2_048
#: Characters of a token. Of the published relations, which may not be there yet: prompts, tokens, different lengths.
CHARACTERS, PUBLISHED = 3, (906, 11_083, 20)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: ``layers``, hidden size ``d``, ``vocabulary``, attention ``heads``, the ``width`` of all of
    them (their neurons) and of all ``keys``; ``experts`` of a layer (0: dense), how many a token is ``routed`` to,
    ``neurons`` of one expert (dense: of a layer) and of the ``shared`` one."""

    layers: int
    d: int
    vocabulary: int
    heads: int
    width: int
    keys: int
    experts: int
    routed: int
    neurons: int
    shared: int

    @classmethod
    def of(cls, model: Mapping) -> Shape | None:
        """From a model's configuration in the names of transformers; None where it does not tell them all."""
        found = manifests.shape_of(model, [])
        sizes = [found["layers"], found["d"], model.get("vocab_size"), found["heads"], found["I"]]
        if not all(sizes) or (found["experts"] and not found["K"]):
            return None
        layers, d, vocabulary, heads, neurons = sizes
        head = model.get("head_dim") or d // heads
        keys = head * (model.get("num_key_value_heads") or heads)
        return cls(
            layers, d, vocabulary, heads, head * heads, keys, found["experts"], found["K"], neurons, found["shared_I"]
        )

    @property
    def ffn(self) -> int:
        """Feed-forward neurons of a layer."""
        return self.neurons * max(1, self.experts) + self.shared

    @property
    def active(self) -> int:
        """Those that work for one token."""
        return self.neurons * max(1, self.routed) + self.shared

    def layer(self, neurons: int) -> int:
        """Parameters of a layer with so many feed-forward neurons (three matrices, as gated ones have)."""
        return self.d * (2 * self.width + 2 * self.keys + 3 * neurons + self.experts)

    @property
    def parameters(self) -> int:
        """All parameters but norms and biases, the embedding apart from the head."""
        return self.layers * self.layer(self.ffn) + 2 * self.vocabulary * self.d

    @property
    def active_parameters(self) -> int:
        """Those that one token is multiplied with."""
        return self.layers * self.layer(self.active) + self.vocabulary * self.d


@dataclass(frozen=True)
class Prompts:
    """How many prompts there are, of how many ``tokens`` in all (a third of their characters), of how many different
    ``lengths`` in tokens, of how many ``relations``."""

    count: int
    tokens: int
    lengths: int
    relations: int

    @classmethod
    def of(cls, asked: facts.Facts, root: Path) -> Prompts:
        """Of the facts of a plan. Published relations that are not there yet count as the average of all twelve."""
        paths, named = [root / path for path in asked.shipped] or list(asked.inputs), len(asked.names)
        if not all(Path(path).is_file() for path in paths):
            count, tokens, lengths = PUBLISHED
            share = named / len(relations.LRE_SHA256)
            return cls(int(count * share), int(tokens * share), lengths, named)
        rows = relations.prompts(relations.select(relations.load(paths), asked.names), asked.seed)
        tokens = [-(-len(row["text"]) // CHARACTERS) for row in rows]
        return cls(len(rows), sum(tokens), len(set(tokens)), named)


# Time: operations of a checkpoint (of products in float32) ------------------------------------------------------------


def forward(shape: Shape, tokens: int) -> float:
    """Operations of the forward pass that a job begins with: 2 x active parameters x ``PADDED`` tokens, and of every
    parameter ``WIDENING`` a batch of ``BATCH`` tokens and ``FIRST``."""
    batches = math.ceil(PADDED * tokens / BATCH)
    return 2 * shape.active_parameters * PADDED * tokens + (WIDENING * batches + FIRST) * shape.parameters


def distributions(shape: Shape, prompts: int, sites: int) -> float:
    """Operations of reading the residual at so many sites of every layer: 2 products of 2 P V d (logits, expected row
    of the unembedding) in float64, which costs twice as much."""
    return sites * shape.layers * 2 * 2 * (2 * prompts * shape.vocabulary * shape.d)


def scores(shape: Shape, prompts: int, neurons: int, active: int) -> float:
    """Operations of scoring ``neurons`` of every layer of which ``active`` work in a prompt: a projection of 2 V d a
    neuron, ``MOMENTS`` moments of 2 V a pair of a prompt and an active neuron."""
    moments = MOMENTS * 2 * shape.vocabulary * prompts * active
    return shape.layers * (2 * shape.vocabulary * shape.d * neurons + moments)


def attribute(shape: Shape, prompts: Prompts) -> float:
    """Operations of the scoring of a checkpoint (norm ``final``): forward pass, distributions before attention and
    feed-forward part, all neurons; heads 2 P V d a layer and ``OF_HEAD`` a prompt, head and token of the vocabulary."""
    heads = shape.layers * prompts.count * shape.vocabulary * (2 * shape.d + OF_HEAD * shape.heads)
    attention = scores(shape, prompts.count, shape.width, shape.width) + heads
    feed_forward = scores(shape, prompts.count, shape.ffn, shape.active)
    return forward(shape, prompts.tokens) + distributions(shape, prompts.count, 2) + attention + feed_forward


def mask_dense(shape: Shape, prompts: Prompts) -> float:
    """Operations of the masking of a dense checkpoint: the same for its feed-forward neurons alone."""
    feed_forward = scores(shape, prompts.count, shape.ffn, shape.active)
    return forward(shape, prompts.tokens) + distributions(shape, prompts.count, 1) + feed_forward


def passes(shape: Shape, ablation: Mapping) -> Counter[int]:
    """Passes over all prompts of an ablation, by how many units are taken away. Every number that differs has ``seeds``
    random controls; every ranking of it a selection, its cross-fitted halves (not per relation) and ``seeds`` matched
    controls."""
    seeds, found = ablation["seeds"], Counter()
    each = seeds + sum(1 + (ranking != "per_relation") + seeds for ranking in ablation["rankings"])
    for site, units in (("head", shape.heads), ("ffn_neuron", shape.ffn)):
        total = shape.layers * units
        for count in {selection.size_of(size, total) for size in selection.SIZES[site]}:
            found[count] += each if count < total else 0
    return found


def ablate(shape: Shape, prompts: Prompts, ablation: Mapping) -> float:
    """Operations of an ablation: a forward pass; ``passes``; single neurons.

    A pass is 2 x active parameters x ``DISTINCT`` tokens, in the layers from the first one touched on: of u units
    spread over the layers, u / (u + 1) of them. Of the sampled neurons each runs in every prompt that it is active in,
    for one token and half the layers; a batch of them begins at every layer, beside one without them, and widens the
    layers that it runs.
    """
    ablated = _over(shape, prompts, passes(shape, ablation))
    sampled = ablation["neurons"] * prompts.count * shape.active / shape.ffn
    single = shape.active_parameters * sampled + _widened(shape, prompts) * (shape.layers + 1) if sampled else 0
    return forward(shape, prompts.tokens) + ablated + single


def _widened(shape: Shape, prompts: Prompts) -> float:
    """Of widening every layer in batches of one length."""
    return WIDENING * shape.parameters * (prompts.lengths + prompts.tokens // BATCH)


def _over(shape: Shape, prompts: Prompts, found: Mapping[int, int]) -> float:
    """Of so many passes over all prompts, by how many units they touch: in the layers from the first of these on, each
    of which is widened once."""
    one = 2 * shape.active_parameters * DISTINCT * prompts.tokens + WIDENING * shape.parameters
    return one * sum(times * units / (units + 1) for units, times in found.items())


def budgets(shape: Shape, asked: Mapping) -> list[frozenset[int]]:
    """The ranks (from 1) of a router's slots that each budget leaves, those that leave the same ones too."""
    left = {"top_n": operator.le, "only_rank": operator.eq, "drop_rank": operator.ne}
    ranks = range(1, shape.routed + 1)
    every = {"top_n": [0, *ranks], "only_rank": ranks, "drop_rank": ranks}
    return [
        frozenset(rank for rank in ranks if left[mode](rank, n))
        for mode, sizes in asked.items()
        for n in (every[mode] if sizes == "all" else sizes)
    ]


def experiments(shape: Shape, relations: int, asked: Mapping) -> Counter[int]:
    """Passes over all prompts with slots left out or experts blocked, by how many experts are touched.

    Two are clean: for what routers choose, and for a check. Budgets touch all; those that leave the same slots run
    once, for each of the ``weights`` where they leave some and not all (families whose routers do not normalise need
    one), times 2 with a shared expert. Each size of ``expert_sets.SIZES`` is blocked by all ``semantics``: in each
    relation its own experts, found on all prompts and fold by fold, and ``seeds`` matched ones; the same in all,
    ``seeds`` random ones.
    """
    different = set(budgets(shape, asked["budgets"]))
    some = sum(0 < len(left) < shape.routed for left in different)
    times = len(different) + some * (len(asked["weights"]) - 1)
    found = Counter({shape.layers * shape.experts: 2 + times * (1 + (shape.shared > 0))})
    for size in expert_sets.SIZES:
        found[size * relations] += len(asked["semantics"]) * (2 + asked["seeds"])
        found[size] += len(asked["semantics"]) * asked["seeds"]
    return found


def trials(shape: Shape, asked: Mapping) -> int:
    """Passes for each pair of a head and an expert: the head zeroed and the expert forced, and as many others of their
    layers as there are, ``seeds`` at most. (A head that pairs share is zeroed once; here it counts each time.)"""
    return 2 + sum(min(asked["seeds"], units - 1) for units in (shape.heads, shape.experts))


def gradients(shape: Shape, prompts: Prompts, steps: int) -> float:
    """Operations of the integrated gradients of a pair: a forward pass for the keys and values of all tokens; then, for
    one token a prompt, both ends of the path, forward, and its ``steps``, forward and as much backward (no weight has a
    gradient). Of the layers from the head's to the expert's, on average (layers + 2) / 3, where all pairs are as likely
    in which the expert is not before the head. Prompts of one length are held together, ``HELD`` at most, and ``ROWS``
    run at once; each batch widens the layers that it runs, and again on its way back."""
    held = prompts.lengths + prompts.count // HELD
    batches = 2 * held + 2 * (prompts.lengths + steps * prompts.count // ROWS)
    between = (shape.layers + 2) / 3
    path = 2 * shape.layer(shape.active) * prompts.count * (2 + 2 * steps) + WIDENING * shape.layer(shape.ffn) * batches
    return 2 * shape.active_parameters * prompts.tokens + WIDENING * shape.parameters * held + between * path


def intervene(shape: Shape, prompts: Prompts, asked: Mapping, named: int) -> float:
    """Operations of the experiments on experts: a forward pass; ``experiments``; pairs of a head and an expert,
    ``strongest`` on either half of the prompts and ``named`` on all.

    Passes are those of an ablation. Each pair takes ``trials`` from the head's layer on (two units are touched), and
    ``gradients``.
    """
    half = replace(prompts, count=prompts.count // 2, tokens=prompts.tokens // 2)
    found = forward(shape, prompts.tokens) + _over(shape, prompts, experiments(shape, prompts.relations, asked))
    for some, pairs in ((half, 2 * asked["strongest"]), (prompts, named)):
        tried = _over(shape, some, {2: trials(shape, asked)})
        found += pairs * (tried + gradients(shape, some, asked["gradient_steps"]))
    return found


def overhead(shape: Shape, prompts: Prompts, asked: Mapping, named: int) -> float:
    """Seconds of the experiments on experts that do not depend on the size of a model."""
    blocked = PASS * experiments(shape, prompts.relations, asked).total()
    return blocked + (asked["strongest"] + named) * (PASS * trials(shape, asked) + PATH)


def training(shape: Shape, entry: Mapping) -> float:
    """Operations of a training: forward and backward, 6 x active parameters x tokens."""
    return 6 * shape.active_parameters * entry["steps"] * entry["batch"] * entry["length"]


@dataclass(frozen=True)
class Machine:
    """Operations a second of a plain float32 product on all ``threads``, and bytes a second of a download."""

    rate: float
    threads: int
    bandwidth: float

    @classmethod
    def measured(cls, bandwidth: float) -> Machine:
        """This one's CPU."""
        import torch

        from moescope import timing

        return cls(timing.gemm_rate(torch.device("cpu"), times=10), torch.get_num_threads(), bandwidth)

    def hours(self, operations: float, fixed: float = 0.0, alone: bool = False) -> float:
        """operations / (``EFFICIENCY`` x rate), and ``fixed`` seconds; ``alone``: on one thread."""
        rate = EFFICIENCY * self.rate / (self.threads if alone else 1)
        return (operations / rate + fixed) / 3600


# Memory and disk (bytes) ----------------------------------------------------------------------------------------------


def memory_of(shape: Shape, prompts: int, local: bool, whole: bool) -> int:
    """Bytes of memory that scoring takes with all prompts at once, as the job plans it (``memory.plan``); with less it
    scores fewer together. ``whole``: the model itself is held too, in float32 (a GGUF file, which cannot be mapped)."""
    from moescope import memory

    neurons = max(shape.width, shape.neurons, shape.shared)
    token = 4 * (8 * shape.d + max(1, shape.routed) * (2 * shape.d + 3 * neurons))
    planned = memory.Shape(shape.vocabulary, shape.d, neurons, 4 * shape.layer(shape.ffn), token)
    return memory.plan(planned, prompts, 2**40, local).bytes + (4 * shape.parameters if whole else 0)


def tables_of(shape: Shape, prompts: Prompts, asked: Mapping, named: int = 0) -> dict[str, float]:
    """Bytes of the tables that each job leaves of one checkpoint. An estimate: compressed, a score takes its four bytes
    and what names it nearly nothing.

    attribute: of a neuron its importance, magnitude and the importance in each relation (half of those of experts are
    zeros), of a prompt 4 bytes a head and 5 an expert; with groups ten sums a neuron, and of a prompt the 2% leading
    active neurons of two rankings that share a third (at least 300). That gives 100 MB for OLMoE-1B-7B and 109 for
    OLMo-7B on the published prompts, 37 and 31 without groups; measured were 100, 95, 36 and 28. ablate: 7 bytes a
    prompt and pass, 15 a prompt and sampled neuron active in it. mask_dense: 42 bytes a neuron and split. intervene
    (``named`` pairs): 2.9 bytes a prompt and intervention, equal ones too, and 4.2 a prompt and gate (a layer's that
    follows a head, the pair's expert), or head of the pair's layer: 0.85, 0.80 and 0.38 MB of a tiny model.
    """
    ffn, attn, routes = shape.layers * shape.ffn, shape.layers * shape.width, shape.experts > 0
    scored = 4 * (prompts.relations + 2) * (ffn / (1 + routes) + attn)
    scored += prompts.count * shape.layers * (4 * shape.heads + 5 * shape.experts)
    if asked["attribution"]["uncertainty"] == "groups":
        listed = sum(max(300, 0.02 * 5 / 3 * n) for n in (attn, shape.layers * shape.active))
        scored += 4 * relations.GROUPS * (ffn + attn) + 4 * prompts.count * listed
    sampled = asked["ablation"]["neurons"] * shape.active / shape.ffn
    ablated = prompts.count * (7 * passes(shape, asked["ablation"]).total() + 15 * sampled)
    return {
        "attribute": scored,
        "ablate": ablated,
        "mask_dense": 42 * SPLITS * ffn,
        "intervene": prompts.count * _intervened(shape, asked["collaboration"], named),
    }


def _intervened(shape: Shape, asked: Mapping, named: int) -> float:
    """Bytes that the experiments on experts leave of one prompt."""
    tested, suppressed = asked["strongest"] + named, 1 + min(asked["seeds"], shape.heads - 1)
    budgeted = len(budgets(shape, asked["budgets"])) * len(asked["weights"]) * (1 + (shape.shared > 0))
    blocked = len(expert_sets.SIZES) * len(asked["semantics"]) * (2 + 2 * asked["seeds"])
    gates = tested * suppressed * (1 + (2 * shape.layers + 1) / 3)
    return 2.9 * (1 + budgeted + blocked + tested * trials(shape, asked)) + 4.2 * (gates + tested * (shape.heads + 1))
