"""Tiny models of every family that llama.cpp knows here, with widths that blocks of 32 divide."""

from __future__ import annotations

from typing import Any

MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
SPARSE = {"moe_intermediate_size": 64, "num_hidden_layers": 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "num_hidden_layers": 2},
    "mistral": {"sliding_window": None, "num_hidden_layers": 2},
    "qwen2": {"num_hidden_layers": 2},
    "qwen3": {"head_dim": 32, "num_hidden_layers": 2},
    "mixtral": {"sliding_window": None, "num_hidden_layers": 2},
    "qwen3_moe": {"head_dim": 32, "mlp_only_layers": [], **SPARSE},
    "qwen2_moe": {
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 64,
        **SPARSE,
    },
    "olmoe": {"num_key_value_heads": 4, "eos_token_id": 2, "num_hidden_layers": 2},
    "deepseek_v3": {**MLA, **SPARSE},
    "glm4_moe": {"head_dim": 32, **SPARSE},
    "gpt_oss": {
        "head_dim": 32,
        "intermediate_size": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
}
