"""Tiny models of the real classes with random weights, a tokenizer to go with them, and prompts of uneven length."""

import functools

import polars as pl
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
#: Families by name, with what makes each of them differ.
FAMILIES = {
    "llama": {},
    "llama_tied": {"_type": "llama", "tie_word_embeddings": True},
    "olmo": {"num_key_value_heads": 4, "clip_qkv": 2.0},
    "olmoe": {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    "olmoe_normed": {
        "_type": "olmoe",
        "intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "olmo2": {},
    "flex_olmo": {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    "gemma2": {
        "head_dim": 8,
        "final_logit_softcapping": 4.0,
        "attn_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 8,
    },
    "granite": {"residual_multiplier": 0.3, "logits_scaling": 2.5, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.25},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 32, "mlp_only_layers": [1]},
}
#: Families that differ in how layers are put together or read: parallel branches with biases, a head with a bias, norms
#: on both sides of a branch, experts behind a multiplier, a factor of the logits under a third name.
LAYOUTS = {
    "gpt_neox": {},
    "phi": {},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "glm4": {"head_dim": 8},
    "granitemoe": {
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "residual_multiplier": 0.3,
        "logits_scaling": 2.5,
    },
    "hyperclovax": {"residual_multiplier": 0.4, "logits_scaling": 0.6},
}
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


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **over: object) -> torch.nn.Module:
    """A model of a family with random weights, large enough that every part matters."""
    shape = {"vocab_size": len(tokenizer()), **SHAPE, **{**FAMILIES, **LAYOUTS}.get(name, {}), **over}
    config = transformers.AutoConfig.for_model(shape.pop("_type", name), **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # norm weights around their own centre
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.25 * noise)
    return model.to(dtype).eval()


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
