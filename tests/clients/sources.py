"""Tiny sources of the outputs that clients are asked for: configs as the Hub's, wide enough for
every client, and the files beside the weights that a client asks for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import load_file, save_file
from surgery import tokenizers_by_hand as by_hand
from tokenizers import AddedToken

from moetool.surgery.layout import Layout

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
PLAIN = {**WIDE, **ROPE}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e5,
        "factor": 2.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 128,
    }
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5]}}
VISION = tiny.FAMILIES["qwen3_vl"][1]["vision_config"]
# What configs of mixtures on the Hub say, made by transformers 4; one that transformers 5 saves
# (condition `v5`) leaves it out.
HUB: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"num_experts": 8, "norm_topk_prob": False},
    "qwen3_moe": {"num_experts": 8},
    "glm4_moe": {"partial_rotary_factor": 0.5},
    "olmoe": {"num_experts": 8},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "gpt_oss": {},
    "granitemoe": {},
    "phimoe": {},
    "ernie4_5_moe": {},
    "qwen3_vl_moe": {"num_experts": 8, "norm_topk_prob": True},
    "deepseek_v2": {"topk_method": "greedy", "scoring_func": "softmax"},
    "minimax_m2": {
        "rotary_dim": 16,
        "shared_intermediate_size": 0,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    },
}
SOURCES: dict[str, dict[str, Any]] = {
    "llama": PLAIN,
    "mistral": {**PLAIN, "sliding_window": None},
    "phi3": PLAIN,
    "gemma": WIDE,
    "qwen2": PLAIN,
    "qwen3": PLAIN,
    "granite": PLAIN,
    "olmo2": PLAIN,
    "cohere2": {**PLAIN, "num_hidden_layers": 4},  # of the usual pattern
    "ernie4_5": PLAIN,
    "lfm2": {**PLAIN, "layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {**WIDE, "layer_types": ["linear_attention", "full_attention"]},
    "stablelm": WIDE,
    "gemma2": {**WIDE, "query_pre_attn_scalar": 32, "sliding_window": 16},
    "gemma3_text": {
        **WIDE,
        "num_hidden_layers": 6,  # of the usual pattern
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "vocab_size": 403,  # the toy tokenizer's: llama.cpp cuts what is more
    },
    "starcoder2": {**PLAIN, "sliding_window": None},
    "opt": {**WIDE, "ffn_dim": 256, "word_embed_proj_dim": 128},
    "llava": {"text_config": {"model_type": "llama", **PLAIN}},
    "qwen3_vl": {
        "text_config": {**WIDE, **MROPE, "intermediate_size": 192},
        "vision_config": {**VISION, "out_hidden_size": 128},
    },
    "mixtral": {**PLAIN, "num_local_experts": 8, "sliding_window": None},
    "qwen2_moe": {
        **PLAIN,
        **EXPERTS,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {**PLAIN, **EXPERTS, "mlp_only_layers": []},
    "glm4_moe": {**PLAIN, **EXPERTS},
    "olmoe": {**PLAIN, "num_key_value_heads": 4, "eos_token_id": 2},
    "deepseek_v3": {**PLAIN, **EXPERTS, **MLA},
    "gpt_oss": {**WIDE, "layer_types": ["sliding_attention", "full_attention"], **YARN},
    "granitemoe": PLAIN,
    "phimoe": {**WIDE, "sliding_window": None},
    "ernie4_5_moe": {**PLAIN, "moe_intermediate_size": 64, "moe_k": 2, "moe_layer_start_index": 0},
    "deepseek_v2": {
        **WIDE,
        **EXPERTS,
        **MLA,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 128,
        },
    },
    "minimax_m2": {
        **WIDE,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e5,
            "partial_rotary_factor": 0.5,
        },
    },
    "qwen3_vl_moe": {
        # no side is another's double: transformers 5 tells how stacks lie by their shape
        "text_config": {
            **WIDE,
            **MROPE,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
        },
        "vision_config": {**VISION, "out_hidden_size": 128},
    },
}
# What llama.cpp's converter asks for by name, and what such models have.
WORDS = {
    "glm4_moe": ("<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|user|>", "<|observation|>"),
}
PIECES = ("ernie4_5", "ernie4_5_moe", "gemma", "gemma2")
# Conditions of sources that do not say all that the Hub's say.
BARE = ("v5", "unscaled", "pieceless")


def save(family: str, folder: Path, config: Mapping[str, Any], condition: str = "") -> None:
    """A tiny model in float32 with a tokenizer; its config as the Hub's, where nothing is BARE."""
    tiny.save(family, folder, **SOURCES[family] | config)
    _tokenizer(folder, WORDS.get(family, ()))
    if family in PIECES and condition not in BARE:
        (folder / "tokenizer.model").write_bytes(b"toy")
    if family in HUB and condition not in BARE:
        _as_on_the_hub(folder, HUB[family])


def _as_on_the_hub(folder: Path, more: Mapping[str, Any]) -> None:
    """Rope in the fields of transformers 4; stacks that transformers 5 turns, as they lie there."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    rope = dict(text.pop("rope_parameters"))
    config["torch_dtype"] = config.pop("dtype")
    text |= {k: rope.pop(k) for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    text["rope_scaling"] = None if len(rope) == 1 else rope
    text |= more
    if text is not config:
        del text["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    if Layout.load(config["model_type"]).overlay.turns_stacks:
        _turn(folder / "model.safetensors")


def _turn(path: Path) -> None:
    """Stacks of experts as [experts, in, out]."""
    tensors = load_file(path)
    stacks = {n: t for n, t in tensors.items() if ".experts." in n}
    turned = {n: t.transpose(1, 2).contiguous() for n, t in stacks.items()}
    save_file(tensors | turned, path, {"format": "pt"})


def _tokenizer(folder: Path, words: tuple[str, ...]) -> None:
    """A toy one, because llama.cpp's converter writes it; `words` it asks for by name."""
    made = by_hand.of_bytes(None)
    made.add_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    by_hand.save(made, folder)
    if folder.name.startswith("phi3"):  # llama.cpp reads sentencepiece of any other class
        told = folder / "tokenizer_config.json"
        said = json.loads(told.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
        told.write_text(json.dumps(said))
