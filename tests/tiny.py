"""Tiny random models of every dense family moetool converts and every MoE family text is sent
through, made by stock transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 256,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# family -> (transformers class, config)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {
            **COMMON,
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "mistral": ("MistralForCausalLM", {**COMMON, "sliding_window": 8}),
    "phi3": ("Phi3ForCausalLM", {**COMMON, "pad_token_id": 0}),
    "qwen2": ("Qwen2ForCausalLM", COMMON),
    "qwen3": ("Qwen3ForCausalLM", {**COMMON, "head_dim": 24}),
    "granite": (
        "GraniteForCausalLM",
        {
            **COMMON,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", COMMON),
    "gemma": ("GemmaForCausalLM", {**COMMON, "head_dim": 24}),
    "cohere2": ("Cohere2ForCausalLM", {**COMMON, "head_dim": 16, "sliding_window": 8}),
    "ernie4_5": ("Ernie4_5ForCausalLM", {**COMMON, "head_dim": 24}),
    "lfm2": (
        "Lfm2ForCausalLM",
        {
            **COMMON,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": True,
            "block_multiple_of": 32,
        },
    ),
    "qwen3_5_text": (
        "Qwen3_5ForCausalLM",
        {
            **COMMON,
            "head_dim": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {
                **COMMON,
                "head_dim": 24,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [4, 4, 4],
                },
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 64,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "vision_end_token_id": 6,
            "tie_word_embeddings": False,
        },
    ),
    "stablelm": (
        "StableLmForCausalLM",
        {
            **COMMON,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **COMMON},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
            "image_token_index": 3,
            "image_seq_length": 4,
        },
    ),
}

MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
SPARSE = {**COMMON, "moe_intermediate_size": 48, "num_experts_per_tok": 3}
# family -> (transformers class, config): every mixture of experts that text is sent through. 8
# experts each.
MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralForCausalLM",
        {**COMMON, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 12},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            **SPARSE,
            "num_experts": 8,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            **SPARSE,
            "num_experts": 8,
            "head_dim": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "olmoe": ("OlmoeForCausalLM", {**COMMON, "num_experts": 8, "num_experts_per_tok": 3}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {
            **SPARSE,
            "num_experts_per_tok": 2,
            **MLA,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **SPARSE,
            "num_experts_per_tok": 2,
            **MLA,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {
            **SPARSE,
            "head_dim": 24,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
        },
    ),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        {
            **COMMON,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
        },
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        {
            **COMMON,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.0,
            "input_jitter_noise": 0.0,
            "sliding_window": None,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **COMMON,
            "head_dim": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        {
            **COMMON,
            "head_dim": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
            "pad_token_id": 0,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {
            **COMMON,
            "head_dim": 24,
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_intermediate_size": 48,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "dots1": (
        "Dots1ForCausalLM",
        {
            **SPARSE,
            "num_experts_per_tok": 2,
            "head_dim": 24,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {
                **SPARSE,
                "head_dim": 24,
                "num_experts": 8,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [4, 4, 4],
                },
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 64,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "tie_word_embeddings": False,
        },
    ),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        {
            **MLA,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 48,
            "num_layers": 3,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "vocab_size": 160,
            "max_position_embeddings": 256,
            "n_routed_experts": 8,
            "zero_expert_num": 2,
            "moe_topk": 3,
            "head_dim": 8,
            "routed_scaling_factor": 1.5,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2ForCausalLM",
        {**COMMON, "head_dim": 24, "num_local_experts": 8, "num_experts_per_tok": 3},
    ),
}

# Dense families that no class with experts is near to.
OTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 160, "n_positions": 64},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {**COMMON, "num_hidden_layers": 2},
    ),
    "opt": (
        "OPTForCausalLM",
        {**COMMON, "num_hidden_layers": 2, "ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    "gemma2": ("Gemma2ForCausalLM", {**COMMON, "head_dim": 24, "query_pre_attn_scalar": 24}),
    "gemma3_text": ("Gemma3ForCausalLM", {**COMMON, "head_dim": 24, "query_pre_attn_scalar": 24}),
    "starcoder2": ("Starcoder2ForCausalLM", COMMON),
}


def save(
    family: str, folder: Path, *, seed: int = 0, dtype: str = "float32", **overrides: Any
) -> Path:
    """Write a random model of a family as safetensors and return its folder."""
    import torch
    import transformers

    cls_name, config = (FAMILIES | MOE | OTHER)[family]
    config = json.loads(json.dumps({**config, **overrides}))
    torch.manual_seed(seed)
    made = transformers.CONFIG_MAPPING[family](**config)
    model = getattr(transformers, cls_name)._from_config(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name:
                parameter.mul_(3.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.05)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """A model in float32 with empty loading info (asserted)."""
    import torch
    import transformers

    architecture = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {k: v for k, v in info.items() if v and k != "error_msgs"}
    assert not wrong, wrong
    return model.eval()


def logits(folder: Path) -> Any:
    """Logits of two fixed sequences, float32."""
    import torch

    ids = torch.randint(10, 150, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return load(folder)(input_ids=ids).logits


def twins(folder: Path, out: Path, *, router: bool) -> Path:
    """A Mixtral of 8 experts, top-1, whose experts 4..7 are those of 0..3 (weights, and with
    `router` their rows too).
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        for e in range(4):
            if f".experts.{e + 4}." in name:
                tensors[name] = tensors[
                    name.replace(f".experts.{e + 4}.", f".experts.{e}.")
                ].clone()
        if router and name.endswith("gate.weight"):
            tensors[name][4:] = tensors[name][:4]
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out
