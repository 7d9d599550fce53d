"""Layers with numbers of experts of their own in every family that has experts: its class builds
them, on the meta device and in its own sizes, or they are refused with the reason.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from moetool.data import JsonObject
from moetool.modeling import carrier
from moetool.surgery import groups, ragged
from moetool.surgery.layout import Layout, families
from moetool.surgery.text_model import TextModel, text_model

DEPTH = 6
# Families that cannot have such layers, and why.
REFUSED = {
    "diffusion_gemma": "no plain stack",
    "dots3_note": "other settings of their own",
    "dots3_note_text": "other settings of their own",
    "gemma4": "other settings of their own",
    "gemma4_text": "other settings of their own",
    "nllb-moe": "no plain stack",
    "openai_privacy_filter": "no plain stack",
    "switch_transformers": "no plain stack",
}
# Whose experts no verb counts: no list of matrices (doge), no router (vitpose_backbone), no count
# in the text config (dbrx), a pattern string for the layers (nemotron_h).
UNCOUNTED = {"dbrx", "doge", "nemotron_h", "vitpose_backbone"}
# Whose class cannot be built from its own defaults, as it leaves numbers open. Those of them that
# tests/tiny.py has are run there.
OPEN = {
    "deepseek_ocr2",
    "dots1",
    "hunyuan_v1_moe",
    "lfm2_moe",
    "qwen3_omni_moe",
    "qwen4_exp",
    "qwen4_exp_text",
}


def usual(family: str) -> JsonObject:
    """The config of a family's class, of a few layers."""
    layout = Layout.load(family)
    config: JsonObject = transformers.CONFIG_MAPPING[family]().to_dict()
    text, field = text_of(config, layout), layout.fields["layers"]
    before, text[field] = text[field], min(text[field], DEPTH)
    for key, value in text.items():
        if isinstance(value, list) and len(value) == before:
            text[key] = value[: text[field]]
    if text.get(layout.fields.get("top_k", "")) is None:  # deepseek_v2 leaves it open
        text[layout.fields["top_k"]] = 2
    return config | {"model_type": family, "architectures": [layout.cls]}


def text_of(config: JsonObject, layout: Layout) -> JsonObject:
    for part in filter(None, layout.text_config.split(".")):
        config = config[part]
    return config


def cut(config: JsonObject, at: TextModel, layer: int, count: int) -> JsonObject:
    """The config where one layer holds `count` experts."""
    made, name = copy.deepcopy(config), at.layout.fields["experts"]
    counts = dict.fromkeys(at.moe_layers(), at.field("experts")) | {layer: count}
    text_of(made, at.layout).update(ragged.fields(counts, at.field("experts"), name))
    return groups.ragged_config(made)


def shapes(cls: Any, config: Any) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {n: p.shape for n, p in cls(config).state_dict().items()}


@pytest.mark.filterwarnings("ignore")  # the classes', of their defaults
@pytest.mark.parametrize("family", families()["moe"])
def test_every_family_builds_them_or_says_why_not(family: str) -> None:
    if family in UNCOUNTED:
        return
    if family in REFUSED:
        at = text_model({"model_type": family})
        assert REFUSED[family] in at.must_be_alike()
        return
    config, stock = usual(family), getattr(transformers, Layout.load(family).cls)
    at = text_model(config)
    assert at.must_be_alike() == ""
    read = transformers.CONFIG_MAPPING[family].from_dict
    if family in OPEN:
        with pytest.raises((AttributeError, TypeError)):
            shapes(stock, read(copy.deepcopy(config)))
        return
    most, layer = at.field("experts"), at.moe_layers()[-1]
    count = max(at.field("top_k") or 1, most // 2)
    alike = shapes(stock, read(copy.deepcopy(config)))
    made = carrier.MoetoolConfig.from_dict(cut(config, at, layer, count))
    other = shapes(carrier.over(stock, family), made)
    assert alike.keys() == other.keys()
    changed = [name for name in alike if alike[name] != other[name]]
    assert len(changed) >= 3 and all(f"layers.{layer}." in name for name in changed)
    for name in changed:
        pairs = [(a, b) for a, b in zip(alike[name], other[name], strict=True) if a != b]
        assert [a - b for a, b in pairs] == [most - count], name


def test_the_lists_are_of_families() -> None:
    listed = [*REFUSED, *UNCOUNTED, *OPEN]
    assert len(set(listed)) == len(listed) and set(listed) < set(families()["moe"])
    assert len(families()["moe"]) - len(listed) == 63
