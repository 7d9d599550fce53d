"""Small random models of the families in the reload matrix: 128 divides every width, so that every
format holds every matrix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import load_file, save_file

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
SPARSE = {**WIDE, "moe_intermediate_size": 128, "num_experts_per_tok": 2}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 128,
}
MLA = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 128,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {**WIDE, **ROPE},
    "qwen3": WIDE,
    "mixtral": {
        **WIDE,
        "num_local_experts": 4,
        "intermediate_size": 128,
        "sliding_window": None,  # as the hub's; llama.cpp knows none
    },
    "qwen3_moe": {**SPARSE, "num_experts": 4, "mlp_only_layers": []},  # llama.cpp knows no other
    "qwen2_moe": {
        **SPARSE,
        "num_experts": 4,
        "shared_expert_intermediate_size": 128,
        "decoder_sparse_step": 1,  # mlx-lm knows no other
    },
    "deepseek_v3": {**SPARSE, **MLA, "head_dim": 128, "n_routed_experts": 4},
    "glm4_moe": {**SPARSE, "n_routed_experts": 4},
    "gpt_oss": {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN},
}
DENSE = ("llama", "qwen3")
# What the hub's configs of these families say too, and other loaders ask for.
_SAID: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe": {"partial_rotary_factor": 0.5},
}


def save(family: str, folder: Path, **more: Any) -> Path:
    """Write a model of the matrix in bf16, with a config as the hub's are; its folder."""
    tiny.save(family, folder, dtype="bfloat16", **{**OVERRIDES[family], **more})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    old = {"rope_theta": rope.get("rope_theta", 10000.0), "torch_dtype": "bfloat16"}
    path.write_text(json.dumps({"rope_scaling": None, **config, **old, **_SAID.get(family, {})}))
    return folder


def mix(made: dict[str, Path], folder: Path) -> None:
    """Write experts of layer N as the Nth of these has them, all else as the first does."""
    folder.mkdir()
    sources = list(made.values())
    files = [load_file(source / "model.safetensors") for source in sources]
    config = json.loads((sources[0] / "config.json").read_text())
    said, groups = config["quantization_config"], {}
    found = {n: t for n, t in files[0].items() if ".experts." not in n}
    for layer, (source, tensors) in enumerate(zip(sources, files, strict=True)):
        inside = f"layers.{layer}.block_sparse_moe.experts."
        found |= {n: t for n, t in tensors.items() if inside in n}
        told = json.loads((source / "config.json").read_text())["quantization_config"]
        (group,) = told["config_groups"].values()
        target = f"re:.*layers\\.{layer}\\.block_sparse_moe\\.experts.*"
        groups[f"group_{layer}"] = group | {"targets": [target]}
    (rest,) = said["config_groups"].values()
    said["config_groups"] = groups | {f"group_{len(groups)}": rest}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(found, folder / "model.safetensors", {"format": "pt"})
