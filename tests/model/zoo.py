"""Tiny configurations of every family that is claimed to work, and of those that are refused."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

SHAPE = {
    "vocab_size": 320,
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
#: Experts are 24 wide: grouped products ask for rows of a multiple of 16 bytes.
TOP2 = {"num_experts": 6, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
MOE = {**TOP2, "moe_intermediate_size": 24}
GROUPED = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
MLA = {**GROUPED, **LATENT, "num_key_value_heads": 4}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 48}
GRANITE = {"residual_multiplier": 0.3, "logits_scaling": 2.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.1}

#: By name, what makes each of them differ from ``SHAPE``; ``_type`` where the name is not that of the family.
ZOO: dict[str, dict] = {
    # dense
    "llama": {},
    "llama_tied": {"_type": "llama", "tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "smollm3": {},
    "seed_oss": {"head_dim": 8},
    "olmo": {"num_key_value_heads": 4, "clip_qkv": 2.0},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "arcee": {},
    "apertus": {},
    "ministral": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "nanochat": {},
    "ernie4_5": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "internlm3": {},
    "jais2": {},
    "youtu": {**LATENT, "num_key_value_heads": 4},
    "exaone4": {},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt_neox_sequential": {"_type": "gpt_neox", "num_key_value_heads": None, "use_parallel_residual": False},
    "gemma": {"head_dim": 12},
    "gemma2": {
        "head_dim": 8,
        "final_logit_softcapping": 4.0,
        "attn_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma4_text": {"head_dim": 12, "hidden_size_per_layer_input": 0, "global_head_dim": 12},
    "phi": {},
    "phi3": {},
    "granite": GRANITE,
    "hyperclovax": {"residual_multiplier": 0.4, "logits_scaling": 0.6},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "stablelm": {},
    "starcoder2": {},
    "nemotron": {},
    "falcon": {},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128, "expansion_ratio": 2},
    "persimmon": {},
    "biogpt": {},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 3, "n_head": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "qwen3_5_text": {**LINEAR, "head_dim": 12},
    "vaultgemma": {"head_dim": 8, "query_pre_attn_scalar": 8},
    # mixtures of experts
    "olmoe": {**TOP2, "intermediate_size": 24},
    "olmoe_normed": {**TOP2, "_type": "olmoe", "intermediate_size": 24, "norm_topk_prob": True},
    "flex_olmo": {**TOP2, "intermediate_size": 24},
    "mixtral": {**LOCAL, "intermediate_size": 24},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 32, "mlp_only_layers": [1]},
    "qwen3_moe": {**MOE, "head_dim": 12, "mlp_only_layers": [1], "norm_topk_prob": True},
    "qwen3_next": {
        **MOE,
        **LINEAR,
        "head_dim": 12,
        "shared_expert_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "qwen3_5_moe_text": {**MOE, **LINEAR, "head_dim": 12, "shared_expert_intermediate_size": 32},
    "mellum": MOE,
    "deepseek_v2": {**MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v2_lite": {
        **MLA,
        "_type": "deepseek_v2",
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "glm_moe_dsa": MLA,
    "glm4_moe": {**GROUPED, "head_dim": 12},
    "glm4_moe_lite": MLA,
    "dots1": {**GROUPED, "head_dim": 12},
    "solar_open": {**GROUPED, "head_dim": 12},
    "exaone_moe": {**MOE, "head_dim": 12},
    "hy_v3": MOE,
    "mimo_v2_flash": {**GROUPED, "head_dim": 8},
    "gpt_oss": {**LOCAL, "intermediate_size": 24, "head_dim": 12, "sliding_window": 4},
    "granitemoe": {**LOCAL, **GRANITE, "intermediate_size": 24},
    "granitemoe_swa": {**LOCAL, **GRANITE, "intermediate_size": 24},
    "granitemoeshared": {**LOCAL, **GRANITE, "intermediate_size": 24, "shared_intermediate_size": 32},
    "granitemoehybrid": {
        **LOCAL,
        **GRANITE,
        "intermediate_size": 24,
        "shared_intermediate_size": 32,
        **MAMBA,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "ernie4_5_moe": {
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_layer_interval": 1,
        "use_bias": True,
    },
    "phimoe": {**LOCAL, "intermediate_size": 24},
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 2, "head_dim": 12, "intermediate_size": 24},
    "minimax_m2": {**LOCAL, "head_dim": 12, "intermediate_size": 24},
    "jamba": {
        **TOP2,
        "intermediate_size": 24,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    },
    "lfm2_moe": {**MOE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "nemotron_h": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "head_dim": 8,
        "moe_shared_expert_intermediate_size": 24,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "num_hidden_layers": 4,
        "layers_block_type": ["attention", "moe", "mamba", "mlp"],
    },
    "afmoe": {**MOE, "num_local_experts": 6, "num_shared_experts": 1, "num_dense_layers": 1, "head_dim": 12},
    "cohere2_moe": MOE,
    "cohere2_moe_sigmoid": {**MOE, "_type": "cohere2_moe", "expert_selection_fn": "sigmoid"},
}
#: Those whose attention and feed-forward part read the same residual.
PARALLEL = {
    *("gpt_neox", "gptj", "codegen", "phi", "falcon", "cohere", "cohere2"),
    *("cohere2_moe", "cohere2_moe_sigmoid"),
}
#: Families and variants that do not fit.
REFUSED: dict[str, dict] = {
    "bloom_post_norm": {
        "_type": "bloom",
        "n_layer": 3,
        "n_head": 4,
        "apply_residual_connection_post_layernorm": True,
    },
    "opt_post_norm": {"_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "minimax": {
        **LOCAL,
        "head_dim": 12,
        "block_size": 4,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
    },
    "longcat_flash": {
        **MLA,
        "num_layers": 3,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 20,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "head_dim": 4,
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 16},
    "jetmoe": {**LOCAL, "kv_channels": 8},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 48,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "gemma4_moe": {
        "_type": "gemma4_text",
        "head_dim": 12,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 12,
    },
}
REFUSED["nemotron_h_latent"] = {**ZOO["nemotron_h"], "_type": "nemotron_h", "moe_latent_size": 16}
#: What they do that leaves no stream of contributions, or none that is found.
OTHERWISE = {
    "bloom_post_norm": "adds to the normed residual, which is no sum any more",
    "opt_post_norm": "norms the stream itself, after every addition (the 350m model)",
    "minimax": "adds to the normed residual, scaled (Text-01; minimax_m2 works)",
    "longcat_flash": "two attentions and two feed-forward parts a layer, with a mixture across them",
    "nemotron_h_latent": "experts read and write a smaller stream of their own, which is projected back",
    "falcon_h1": "attention and a state space side by side: their neurons would go by the same numbers",
    "mamba2": "no feed-forward part, nothing that corresponds to the studies",
    "jetmoe": "a mixture of attention heads; experts in a module of their own kind",
    "llama4_text": "the router scales what experts read, not what they write; no common experts module",
    "dbrx": "no common experts module; attention and norms in one block",
    "gemma4_moe": "two feed-forward parts, each behind a norm of its own, summed and normed again",
}
#: Families whose configurations go by names of their own, which ``SHAPE`` would contradict.
_OWN_NAMES = {"gpt2", "gpt_bigcode", "gptj", "codegen", "mpt", "xglm", "bloom", "dbrx"}
_COMMON = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **over: object) -> nn.Module:
    """A model of the zoo with random weights, large enough that every part matters."""
    own = {**ZOO, **REFUSED}.get(name, {})
    kind = own.get("_type", name)
    keep = {*_COMMON, *({"hidden_size"} if kind == "bloom" else ())} if kind in _OWN_NAMES else SHAPE
    shape = {**{k: SHAPE[k] for k in keep}, **own, **over}
    shape.pop("_type", None)
    if shape.get("num_key_value_heads", 0) is None:  # the configuration has no such field
        del shape["num_key_value_heads"]
    config = transformers.AutoConfig.for_model(kind, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # what is drawn when a model is made stays in its vectors
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    corrections = [(n, b) for n, b in model.named_buffers() if n.endswith(("correction_bias", "expert_bias"))]
    with torch.no_grad():
        for key, parameter in [*model.named_parameters(), *corrections]:
            if key.endswith(("A_log", "dt_bias", ".D")):
                continue  # decay and step of state space models
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # norm weights around their own centre
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.25 * noise)
    return model.to(dtype).eval()
