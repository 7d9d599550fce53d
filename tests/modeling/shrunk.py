"""Tiny random models of any family, by the names of its config's fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

Config = dict[str, Any]
WIDE = 16
_ID, _SPECIAL = r".*token_(id|index)", ("pad_token_id", "bos_token_id", "eos_token_id")
# pattern of a field's name -> its value; the first that fits
_SIZES = (
    (r"(num_)?key_value_heads|num_kv_heads|n_head_kv", 1),
    (r".*head_dim|d_kv|kv_channels|d_head|dim_head", 8),
    (r".*(num_attention_heads|num_heads|n_heads?|attention_heads|num_attn_heads)", 2),
    (r"(num_hidden_layers|num_layers|n_layers?|depth|.*_layers_num|.*_num_layers)", 2),
    (r"(encoder|decoder)_layers|num_(encoder|decoder)_layers|.*_num_hidden_layers", 2),
    (r".*intermediate_size|.*_?ffn_dim|n_inner|d_ff|ffn_hidden_size|hidden_dim|d_inner", 32),
    (r"dim_ff|dff|ffn_inner_dim|intermediate_dim", 32),
    (r".*hidden_size|d_model|n_embd|.*embed_dim|dim|embedding_size|d_embed|embed_size", WIDE),
    (r"word_embed_proj_dim|vision_dim|text_dim|projection_dim|proj_dim|output_dim", WIDE),
    (r"n_embed|emb_dim|d_proj|model_dim|width|pooler_output_size|output_size", WIDE),
    (r".*vocab_size|n_vocab|num_text_tokens", 64),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length", 64),
    (r"seq_length|max_(source|target|text)_positions|max_2d_position_embeddings", 64),
    (r"image_size|img_size|input_size", 16),
    (r"patch_size", 8),
    (r"num_mel_bins|n_mels|feature_size|input_feat_per_channel|num_freq", 8),
    (r"mlp_ratio", 2),
    (r"rotary_dim|num_conv_pos_embeddings", 4),
    (r"num_conv_pos_embedding_groups", 2),
    (r"num_labels", 3),
    (r"classifier_proj_size|xvector_output_dim|num_codevectors_per_group", WIDE),
)
_LISTS = {"conv_dim": [8], "conv_kernel": [10], "conv_stride": [5]}
# what a family asks for beside
_MORE: dict[str, Config] = {
    "diffllama": {"num_key_value_heads": 2},
    "esmc": {"num_key_value_heads": 2},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "qwen2_vl": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            }
        }
    },
}


def model(family: str, cls: str, folder: Path) -> Any:
    """Saved in a folder; biases and norms are random too."""
    torch.manual_seed(3)
    found = transformers.CONFIG_MAPPING[family]
    said = _merged(_shrunk(found().to_dict(), [0]), _MORE.get(family, {}))
    made = getattr(transformers, cls)(found(**said)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.is_floating_point() and parameter.dim() < 2:
                parameter += torch.randn_like(parameter) * 0.1
    made.save_pretrained(folder)
    return getattr(transformers, cls).from_pretrained(folder).eval()


def _shrunk(data: Mapping[str, Any], ids: list[int]) -> Config:
    """The fields to set, parts of the config included. `ids`: [the last special token]."""
    made: Config = {}
    for name, value in data.items():
        if isinstance(value, dict) and "model_type" in value:
            made[name] = {"model_type": value["model_type"], **_shrunk(value, ids)}
        elif re.fullmatch(_ID, name) and (type(value) is int or name in _SPECIAL):
            ids[0] += 1
            made[name] = ids[0]
        elif name in _LISTS and isinstance(value, list | tuple):
            made[name] = _LISTS[name]
        elif (size := _size(name)) is not None and not isinstance(value, bool | str | dict):
            made[name] = _like(value, size)
    return {name: value for name, value in made.items() if value is not None}


def _size(name: str) -> int | None:
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)


def _like(value: Any, size: int) -> Any:
    """A size in the kind of the value that it stands for; None for a list of another kind."""
    if isinstance(value, list | tuple):
        return [size] * 2 if len(value) == 2 and type(value[0]) is int else None
    return float(size) if isinstance(value, float) else size


def _merged(one: Config, other: Config) -> Config:
    both = {k: _merged(one[k], v) for k, v in other.items() if isinstance(v, dict) and k in one}
    return one | other | both


def inputs(made: Any) -> dict[str, Any]:
    """What a model's forward takes, as far as names tell."""
    config, names = made.config, inspect.signature(made.forward).parameters
    draw, found = torch.Generator().manual_seed(1), dict[str, Any]()
    if "input_ids" in names and made.main_input_name != "input_features":
        found["input_ids"] = torch.randint(20, 60, (2, 9), generator=draw)
    if "decoder_input_ids" in names and config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.randint(20, 60, (2, 5), generator=draw)
    text_alone = "input_ids" in names and "labels" in names
    if "pixel_values" in names and not text_alone:
        size = getattr(config, "image_size", None)
        size = size or getattr(getattr(config, "vision_config", None), "image_size", 16)
        side = size if isinstance(size, int) else size[0]
        found["pixel_values"] = torch.randn(2, 3, side, side, generator=draw)
    if "input_values" in names:
        found["input_values"] = torch.randn(2, 400, generator=draw)
    if made.main_input_name == "input_features":
        found["input_features"] = torch.randn(2, 8, 64, generator=draw)
    return found


def outputs(made: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    """All floats that a model gives."""
    torch.manual_seed(0)
    with torch.no_grad():
        return [t for t in _flat(made(**given)) if t.is_floating_point()]


def _flat(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, dict | list | tuple):
        for one in found.values() if isinstance(found, dict) else found:
            yield from _flat(one)
