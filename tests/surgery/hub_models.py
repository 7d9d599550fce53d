"""InternLM2 as its own code has it, written from its specification: tiny checkpoints, and what they
compute in float64. transformers has no such class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensor = torch.Tensor
CONFIG: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "max_position_embeddings": 64,
    "model_type": "internlm2",
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 100000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 300,
}
TWOFOLD = {"architectures": ["InternLM2VEForCausalLM"], "model_type": "internlm2ve"}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    joined = (heads + 2 * pairs) * hidden // heads
    found = {
        "model.tok_embeddings.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "output.weight": (config["vocab_size"], hidden),
    }
    second = "VE" in config["architectures"][0]
    for layer in range(config["num_hidden_layers"]):
        head = f"model.layers.{layer}."
        found |= {f"{head}attention_norm.weight": (hidden,), f"{head}ffn_norm.weight": (hidden,)}
        found |= {f"{head}attention.wqkv.weight": (joined, hidden)}
        found |= {f"{head}attention.wo.weight": (hidden, hidden)}
        if config["bias"]:
            found |= {f"{head}attention.wqkv.bias": (joined,)}
            found |= {f"{head}attention.wo.bias": (hidden,)}
        for block in ("feed_forward", *(["feed_forward_ve"] if second else [])):
            found |= {f"{head}{block}.{w}.weight": (wide, hidden) for w in ("w1", "w3")}
            found |= {f"{head}{block}.w2.weight": (hidden, wide)}
    return found


def save(folder: Path, dtype: torch.dtype = torch.float32, **changed: Any) -> Path:
    """A tiny random checkpoint in a folder of its own."""
    config = {**CONFIG, **changed}
    some = torch.Generator().manual_seed(3)
    made = {n: torch.randn(s, generator=some) * 0.12 for n, s in shapes(config).items()}
    made = {n: t + 1 if "norm" in n else t for n, t in made.items()}
    folder.mkdir()
    save_file({n: t.to(dtype) for n, t in made.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_inside(plain: Path, folder: Path) -> Path:
    """The same model inside an InternVL."""
    config = json.loads((plain / "config.json").read_text())
    held = load_file(plain / "model.safetensors")
    made = {f"language_model.{name}": tensor for name, tensor in held.items()}
    made |= {"mlp1.0.weight": torch.ones(8)}
    made |= {"vision_model.embeddings.class_embedding": torch.ones(1, 1, 8)}
    folder.mkdir()
    save_file(made, folder / "model.safetensors")
    said = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat"}
    said |= {"llm_config": config, "vision_config": {"model_type": "intern_vit_6b"}}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def logits(folder: Path, ids: Tensor, images: Tensor | None = None) -> Tensor:
    """Float64 [batch, length, vocabulary]. `images`: which tokens are of images [batch, length]."""
    config = json.loads((folder / "config.json").read_text())
    read = {n: t.double() for n, t in load_file(folder / "model.safetensors").items()}
    x = read["model.tok_embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        own = {n.removeprefix(f"model.layers.{layer}."): t for n, t in read.items()}
        x = x + _attention(config, own, _norm(x, own["attention_norm.weight"], config))
        inner = _norm(x, own["ffn_norm.weight"], config)
        made = _ffn(own, "feed_forward", inner)
        if images is not None:
            mask = images[..., None].double()
            made = made * (1 - mask) + _ffn(own, "feed_forward_ve", inner) * mask
        x = x + made
    return _norm(x, read["model.norm.weight"], config) @ read["output.weight"].T


def _norm(x: Tensor, weight: Tensor, config: dict[str, Any]) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])


def _ffn(own: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
    gate, up, down = (own[f"{block}.{w}.weight"].T for w in ("w1", "w3", "w2"))
    return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down


def _attention(config: dict[str, Any], own: dict[str, Tensor], x: Tensor) -> Tensor:
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    batch, length, hidden = x.shape
    wide, shared = hidden // heads, heads // pairs
    both = x @ own["attention.wqkv.weight"].T + own.get("attention.wqkv.bias", 0)
    both = both.view(batch, length, pairs, shared + 2, wide).transpose(1, 2)
    q, k, v = both[..., :shared, :], both[..., shared, :], both[..., shared + 1, :]
    q, k = _turned(config, q.transpose(2, 3)), _turned(config, k)
    scores = torch.einsum("bpgqd,bpkd->bpgqk", q, k) / wide**0.5
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    mixed = torch.einsum("bpgqk,bpkd->bqpgd", shares, v).reshape(batch, length, hidden)
    return mixed @ own["attention.wo.weight"].T + own.get("attention.wo.bias", 0)


def _turned(config: dict[str, Any], x: Tensor) -> Tensor:
    """Rotary positions [..., length, wide]; dynamic ones grow their base beyond the limit."""
    length, wide = x.shape[-2:]
    base, scaling = config["rope_theta"], config["rope_scaling"]
    most = config["max_position_embeddings"]
    if scaling and scaling["type"] == "dynamic" and length > most:
        factor = scaling["factor"]
        base = base * (factor * length / most - (factor - 1)) ** (wide / (wide - 2))
    places = torch.arange(length).double()
    if scaling and scaling["type"] == "linear":
        places = places / scaling["factor"]
    angles = torch.outer(places, base ** (-torch.arange(0, wide, 2).double() / wide))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    half = torch.cat((-x[..., wide // 2 :], x[..., : wide // 2]), -1)
    return x * cos + half * sin
