"""Tiny models of the real classes with random weights, a tokenizer to go with them, and prompts of uneven length."""

import functools

import polars as pl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.model.zoo import build

__all__ = ["build", "prompts", "tokenizer"]

#: Families that are tested in depth: what makes each of them differ is said in ``zoo``.
FAMILIES = [
    *("llama", "llama_tied", "olmo", "olmoe", "olmoe_normed", "olmo2", "flex_olmo", "gemma2", "granite", "cohere"),
    "qwen2_moe",
]
#: Families that differ in how layers are put together or read: parallel branches with biases, a head with a bias, norms
#: on both sides of a branch, experts behind a multiplier, a factor of the logits under a third name.
LAYOUTS = ["gpt_neox", "phi", "gemma3_text", "glm4", "granitemoe", "hyperclovax"]
FACTS = [
    ("capital", "France", "Paris"),
    ("capital", "the United Mexican States", "Mexico City"),
    ("capital", "Italy", "Rome"),
    ("capital", "the Kingdom of Spain in Europe", "Madrid"),
    ("language", "France", "French"),
    ("language", "Italy", "Italian"),
    ("language", "the Kingdom of Spain in Europe", "Spanish"),
    ("language", "Switzerland", "German"),
    ("language", "Switzerland", "Italian"),
]
TEMPLATES = {"capital": "The capital of {} is", "language": "In {} they speak"}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer that adds nothing to a prompt."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    words = [TEMPLATES[r].format(s) + " " + o for r, s, o in FACTS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(words, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=model)


def prompts(times: int = 1) -> pl.DataFrame:
    """A ``prompts`` table; ``times`` repeats the facts under other relation names."""
    rows = [
        {
            "prompt_id": f"{relation}{k}/{i}",
            "relation": f"{relation}{k}",
            "category": "places",
            "subject": subject,
            "object": answer,
            "template": TEMPLATES[relation],
            "text": TEMPLATES[relation].format(subject),
            "group": i % 4,  # several prompts a group, and groups without any
        }
        for k in range(times)
        for i, (relation, subject, answer) in enumerate(FACTS)
    ]
    return pl.DataFrame(rows).sort("prompt_id")


def anonymous_memory() -> int:
    """Bytes that this process holds in memory and no file backs (Linux)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
