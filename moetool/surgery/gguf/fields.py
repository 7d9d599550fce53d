"""The config of a model as fields of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.containers.wire import HeaderField
from moetool.surgery.gguf.families import Dialect
from moetool.surgery.text_model import TextModel


def fields(at: TextModel, found: Dialect, name: str, file_type: int) -> list[HeaderField]:
    """Everything but the tokenizer. `name`: what the model is called, or nothing."""
    general = [
        HeaderField("general.architecture", "str", found.arch),
        HeaderField("general.type", "str", "model"),
        *([HeaderField("general.name", "str", name)] if name else []),
        HeaderField("general.file_type", "u32", file_type),
        HeaderField("general.quantization_version", "u32", 2),
    ]
    said = {f.key: f for f in (*_told(at, found), *_rope(at, found))}
    return [*general, *_grouped(said, found.arch)]


def _told(at: TextModel, found: Dialect) -> Iterator[HeaderField]:
    """The family's rows; a field that the config does not have is left out."""
    text = at.text
    for key, kind, formula in found.fields:
        value: Any = text.get(formula) if kind != "u32" else at.layout.evaluate(formula, text)
        if value is not None:
            yield HeaderField(f"{found.arch}.{key}", kind, float(value) if kind == "f32" else value)


def _grouped(said: dict[str, HeaderField], arch: str) -> list[HeaderField]:
    """Groups of experts only where they choose: llama.cpp refuses groups of which all are taken."""
    count, used = (f"{arch}.expert_group_{w}" for w in ("count", "used_count"))
    if count in said and used in said and said[used].value >= said[count].value:
        return [f for k, f in said.items() if k not in (count, used)]
    return list(said.values())


def rope_parameters(at: TextModel) -> JsonObject:
    """How positions are rotated, from either spelling of the config (`rope_parameters` of
    transformers 5, `rope_theta` and `rope_scaling` before).
    """
    text = at.text
    told: JsonObject = text.get("rope_parameters") or text.get("rope_scaling") or {}
    said: JsonObject = (at.layout.defaults.get("rope_parameters") or {}) | told
    if "rope_type" not in told and "type" in told:
        said["rope_type"] = told["type"]
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if text.get(name) is not None and name not in told:
            said[name] = text[name]
    return {"rope_type": "default", "rope_theta": 10000.0} | said


def _rope(at: TextModel, found: Dialect) -> Iterator[HeaderField]:
    said, arch = rope_parameters(at), found.arch
    yield HeaderField(f"{arch}.rope.freq_base", "f32", float(said["rope_theta"]))
    factor = said.get("partial_rotary_factor")
    width = at.layout.evaluate("head_dim", at.text)
    if factor is not None and width is not None and "qk_rope_head_dim" not in at.text:
        yield HeaderField(f"{arch}.rope.dimension_count", "u32", int(width * factor))
    kind = said["rope_type"]
    if kind in ("default", "llama3"):  # llama3: a tensor of factors
        return
    if kind not in ("linear", "yarn"):
        raise MoetoolError(
            f"positions of the kind {kind!r} are none that moetool can tell llama.cpp of",
            expected="default, llama3, linear or yarn",
            found=kind,
            hint="choose another format",
        )
    yield HeaderField(f"{arch}.rope.scaling.type", "str", kind)
    yield HeaderField(f"{arch}.rope.scaling.factor", "f32", float(said["factor"]))
    if kind == "yarn":
        yield from _yarn(said, arch)


def _yarn(said: JsonObject, arch: str) -> Iterator[HeaderField]:
    head = f"{arch}.rope.scaling."
    original = said.get("original_max_position_embeddings")
    if original is not None:
        yield HeaderField(head + "original_context_length", "u32", int(original))
    words = {
        "yarn_ext_factor": "extrapolation_factor",
        "yarn_attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    for key, word in words.items():
        if said.get(word) is not None:
            yield HeaderField(head + key, "f32", float(said[word]))
    if said.get("mscale_all_dim") is not None:
        yield HeaderField(head + "yarn_log_multiplier", "f32", 0.1 * float(said["mscale_all_dim"]))


def rope_factors(at: TextModel) -> list[float]:
    """What each pair's frequency is divided by where positions are stretched as Llama 3.1 does
    (transformers, modeling_rope_utils.py, _compute_llama3_parameters); empty elsewhere.
    """
    said = rope_parameters(at)
    width = at.layout.evaluate("head_dim", at.text)
    if said["rope_type"] != "llama3" or width is None:
        return []
    low, high = (float(said[f"{w}_freq_factor"]) for w in ("low", "high"))
    original, factor = float(said["original_max_position_embeddings"]), float(said["factor"])
    made = []
    for pair in range(width // 2):
        length = 2 * math.pi * said["rope_theta"] ** (2 * pair / width)
        smooth = (original / length - low) / (high - low)
        smooth = min(1.0, max(0.0, smooth))
        made.append(1 / ((1 - smooth) / factor + smooth))
    return made
