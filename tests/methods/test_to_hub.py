"""Copies of FFNs for image tokens as Mono-InternVL's text model, against what its own code computes
(an independent one in float64).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.upcycled import own_logits
from safetensors.torch import load_file, save_file
from surgery import hub_models

import moetool
from moetool.errors import MoetoolError

Models = Callable[..., Path]
IDS = torch.randint(5, 150, (2, 40), generator=torch.Generator().manual_seed(2))
IMAGES = torch.zeros_like(IDS).bool()
IMAGES[:, 3:20] = True
PLAIN = {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
CLONES = {"form": "full", "key": "modality", "experts": 1, "top_k": 1, "modality_ids": "7"}


def clones(source: Path, out: Path, **options: Any) -> Path:
    """An upcycle whose copies are no longer what they were at birth."""
    moetool.upcycle(str(source), str(out), **{**CLONES, **options})
    (file,) = out.glob("*.safetensors")
    held, some = load_file(file), torch.Generator().manual_seed(5)
    for name, tensor in held.items():
        if ".experts.0." in name:
            noise = torch.randn(tensor.shape, generator=some)
            held[name] = (tensor + 0.05 * noise).to(tensor.dtype)
    save_file(held, file, {"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("family", "said", "options"),
    [
        ("llama", {}, {"law": "hard"}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}, {}),
        ("llama", {"rope_parameters": {**DYNAMIC, "rope_theta": 1e4}}, {}),
        ("llama", {}, {"layers": "1,3", "name": "images"}),
        ("llava", {}, {}),
    ],
)
def test_its_own_code_computes_the_same(
    family: str, said: dict[str, Any], options: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    """Of text and of marked tokens; layers without a copy are written with one of their FFN, and of
    a LLaVA the text model alone.
    """
    source = models(family, **({**PLAIN, **said} if family == "llama" else {}))
    own, native = clones(source, tmp_path / "own", **options), tmp_path / "native"
    report = moetool.materialize(str(own), str(native), target="internlm2_ve")
    assert report["certificate"]["level"] == ("exact" if family == "llama" else "exact_if")
    towers = [n for n in report["dropped_tensors"] if "vision_tower" in n]
    assert bool(towers) == (family == "llava")
    model = moetool.load(str(own), dtype="float32").eval()
    for images in (torch.zeros_like(IMAGES), IMAGES):
        with torch.no_grad():
            wanted = model(input_ids=IDS, modality=images.long()).logits
        made = hub_models.logits(native, IDS, images)
        assert (made - wanted).abs().max() / wanted.abs().max() < 1e-5
    moetool.verify(str(native), against=[str(own)], load=False)
    config = json.loads((native / "config.json").read_text())
    held = load_file(native / "model.safetensors")
    assert {n: tuple(t.shape) for n, t in held.items()} == hub_models.shapes(config)
    assert set(hub_models.CONFIG) - {"attn_implementation", "auto_map"} <= set(config)
    assert config["image_token_id"] == 7 and not config["tie_word_embeddings"]


def test_there_and_back(tmp_path: Path) -> None:
    """From files of the class itself, byte for byte."""
    source = hub_models.save(tmp_path / "source", torch.bfloat16, bias=True, **hub_models.TWOFOLD)
    again = tmp_path / "again"
    moetool.materialize(str(source), str(again), target="internlm2_ve")
    one, other = (load_file(at / "model.safetensors") for at in (source, again))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    first, second = (json.loads((at / "config.json").read_text()) for at in (source, again))
    assert {n: v for n, v in first.items() if n not in ("attn_implementation", "auto_map")} == {
        n: v for n, v in second.items() if n in first
    }


def test_what_is_written_is_read(models: Models, tmp_path: Path) -> None:
    """The groups are those that were written, and text alone is the base."""
    own, native = clones(models("llama", **PLAIN), tmp_path / "own"), tmp_path / "native"
    moetool.materialize(str(own), str(native), target="internlm2_ve")
    for at in (own, native):
        moetool.materialize(str(at), str(tmp_path / f"{at.name}-text"), target="base")
    assert torch.equal(own_logits(tmp_path / "own-text"), own_logits(tmp_path / "native-text"))
    model = moetool.load(str(native), dtype="float32").eval()
    ids = IDS.clone()
    ids[:, 5] = 7
    with torch.no_grad():
        made = model(input_ids=ids).logits
    apart = (made - hub_models.logits(native, ids, ids == 7)).abs().max()
    assert apart / made.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "said", "options", "words"),
    [
        ("qwen2", {}, {}, "stands on qwen2"),
        ("qwen3", {}, {}, "stands on qwen3"),
        ("llama", {"mlp_bias": True}, {}, "no biases"),
        ("llama", {"head_dim": 24}, {}, "64 / 4 wide, and these 24"),
        ("llama", {"hidden_act": "gelu"}, {}, "compute with silu, and these with gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
            {},
            "rotary positions of the kind yarn",
        ),
        ("llama", {}, {"experts": 3}, "holds 4 experts for 2 kinds"),
        ("llama", {}, {"modality_ids": "7/8"}, "holds 2 experts for 3 kinds"),
        ("llama", {}, {"form": "lora", "rank": 4, "experts": 2}, "lora experts"),
        ("llama", {}, {"form": "adapter", "adapter_dim": 8, "experts": 2}, "adapter experts"),
        ("llama", {}, {"site": "attention"}, "not at the FFNs"),
        ("llama", {}, {"key": "token", "modality_ids": "", "experts": 2}, "the kind of a token"),
    ],
)
def test_what_it_cannot_hold(
    family: str,
    said: dict[str, Any],
    options: dict[str, Any],
    words: str,
    models: Models,
    tmp_path: Path,
) -> None:
    own = tmp_path / "own"
    target = {} if "form" in options else {"target": "moetool"}
    asked = {**CLONES, **target, **options}
    plain = PLAIN if family == "llama" else {}
    source = models(family, **{**plain, **said})
    moetool.upcycle(str(source), str(own), **{k: v for k, v in asked.items() if v})
    with pytest.raises(MoetoolError) as raised:
        moetool.materialize(str(own), str(tmp_path / "native"), target="internlm2_ve")
    assert words in str(raised.value)
    assert not (tmp_path / "native").exists()


def test_plain_models_have_nothing_to_write(models: Models, tmp_path: Path) -> None:
    with pytest.raises(MoetoolError, match="no groups of experts"):
        moetool.materialize(str(models("llama")), str(tmp_path / "out"), target="internlm2_ve")
