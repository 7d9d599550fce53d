"""Models with groups of experts written by hand: the base's own bytes, a config that says the
groups, and tensors under the names that surgery/groups.py gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

from moetool.kernels import two_bits
from moetool.surgery import groups, shim
from moetool.surgery.groups import Group

Tensor = torch.Tensor
IDS = torch.randint(10, 150, (2, 24), generator=torch.Generator().manual_seed(1))
SMALL = {"num_hidden_layers": 2, "vocab_size": 160, "pad_token_id": 0, "tie_word_embeddings": False}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2}
# Families that tests/tiny.py has not: class, config
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2ForCausalLM", {**tiny.COMMON, "head_dim": 16, "sliding_window": 8}),
    "mamba": ("MambaForCausalLM", {"hidden_size": 64, **SMALL, "state_size": 8}),
    "mamba2": (
        "Mamba2ForCausalLM",
        {
            "hidden_size": 64,
            **SMALL,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
        },
    ),
    "exaone4": ("Exaone4ForCausalLM", tiny.COMMON),
    "apertus": ("ApertusForCausalLM", tiny.COMMON),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", {**tiny.COMMON, "head_dim": 16}),
    "bamba": (
        "BambaForCausalLM",
        {**tiny.COMMON, **MAMBA, "mamba_n_groups": 2, "attn_layer_indices": [1, 3]},
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        {**tiny.COMMON, **MAMBA, "mamba_d_ssm": 128, "mamba_n_groups": 2, "head_dim": 16},
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        {
            **tiny.COMMON,
            "num_hidden_layers": 4,
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "hybrid_layer_ids": [1, 3],
            "num_mem_blocks": 1,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **tiny.COMMON,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [2, 3, 3],
                },
            },
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 2,
                "mlp_ratio": 2,
            },
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "vision_end_token_id": 6,
            "tie_word_embeddings": False,
        },
    ),
}
_FFN = re.compile(r"(.*\blayers\.(\d+)\.mlp)\.(gate_proj|up_proj|gate_up_proj|down_proj)\.weight")


def base(family: str, folder: Path, dtype: str = "float32") -> Path:
    """A tiny model of a family."""
    if family not in MORE:
        return tiny.save(family, folder, dtype=dtype)
    tiny.FAMILIES |= {family: MORE[family]}
    try:
        return tiny.save(family, folder, dtype=dtype)
    finally:
        del tiny.FAMILIES[family]


def write(source: Path, out: Path, *held: Group, random: bool = False) -> Path:
    """`source` with groups: at birth, or with random numbers that change what it computes."""
    out.mkdir(parents=True, exist_ok=True)
    config = groups.config_of(json.loads((source / "config.json").read_text()), held)
    (out / "config.json").write_text(json.dumps(config | {"auto_map": shim.AUTO_MAP}))
    (out / shim.FILE).write_text(shim.TEXT)
    tensors = load_file(source / "model.safetensors")
    draw = torch.Generator().manual_seed(7)
    for group in held:
        tensors |= _group(tensors, group, draw, random)
        if group.base == "gone":
            gone = [n for n in tensors if (m := _FFN.fullmatch(n)) and int(m[2]) in group.layers]
            tensors = {n: t for n, t in tensors.items() if n not in gone}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _group(
    tensors: Mapping[str, Tensor], group: Group, draw: torch.Generator, random: bool
) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        found = _FFN.fullmatch(name)
        if not found or int(found[2]) not in group.layers:
            continue
        block, linear = found[1], found[3]
        for expert in range(group.experts):
            stem = f"{block}.{group.expert(expert, linear)}"
            made |= _PARTS[group.form](stem, weight, group, draw, random)
            if group.params.get("output_scale"):
                scale = torch.full((1,), 0.25 if random else 0.0)
                made[f"{block}.{group.expert(expert, part='output_scale')}"] = scale
        if linear == "down_proj":
            shape = (group.choices, weight.shape[0])
            made[f"{block}.{group.router}.weight"] = _random(shape, draw, weight)
    return made


def _random(shape: tuple[int, ...], draw: torch.Generator, like: Tensor) -> Tensor:
    return (torch.randn(shape, generator=draw) * shape[-1] ** -0.5).to(like.dtype)


def _lora(stem: str, weight: Tensor, group: Group, draw: Any, random: bool) -> dict[str, Tensor]:
    rank, (out, into) = group.params["rank"], weight.shape
    if stem.rpartition(".")[2] not in group.params.get("targets", [stem.rpartition(".")[2]]):
        return {}
    b = _random((out, rank), draw, weight) if random else weight.new_zeros(out, rank)
    return {f"{stem}.lora_A": _random((rank, into), draw, weight), f"{stem}.lora_B": b}


def _full(stem: str, weight: Tensor, group: Group, draw: Any, random: bool) -> dict[str, Tensor]:
    return {f"{stem}.weight": _random(tuple(weight.shape), draw, weight)}


def _ternary(stem: str, weight: Tensor, group: Group, draw: Any, random: bool) -> dict[str, Tensor]:
    (out, into), size = weight.shape, group.params.get("group")
    codes = torch.randint(-1, 2, (out, into), generator=draw, dtype=torch.int8)
    shape = (out, into // size) if size else (1,)
    scale = (torch.rand(shape, generator=draw) * 0.1).half().float()
    return {f"{stem}.weight_packed": two_bits.packed(codes), f"{stem}.weight_scale": scale}


def _null(*args: Any) -> dict[str, Tensor]:
    return {}


_PARTS = {"lora": _lora, "full": _full, "ternary": _ternary, "null": _null}


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((one.detach() - other.detach()).abs().max() / other.detach().abs().max())
