"""Experts at the projector between a vision tower and the text model: a tower of one module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.grown import apart
from modeling.test_other_experts import shaken
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import moetool
from moetool.errors import MoetoolError, UsageError
from moetool.modeling.block import blocks
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.complete import compare

Models = Callable[..., Path]
IMAGE, TEXT = 3, torch.tensor([[7, 11, 3, 3, 3, 3, 13, 17]])
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
WAYS: dict[str, dict[str, Any]] = {
    "adapter": {"form": "adapter", "adapter_dim": 16, "experts": 6, "law": "soft"},
    "lora": {"form": "lora", "rank": 4, "experts": 3},
    "full": {"target": "moetool", "experts": 3},
    "film": {"form": "film", "experts": 2},
}


def loaded(folder: Path) -> Any:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def seen(model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(input_ids=TEXT, pixel_values=PIXELS).logits
    return made


@pytest.mark.parametrize("way", WAYS)
def test_exact_at_birth_and_written_again_as_it_was(
    way: str, models: Models, tmp_path: Path
) -> None:
    source, out = models("llava"), tmp_path / "out"
    report = moetool.upcycle(str(source), str(out), tower="projector", **WAYS[way])
    assert report["certificate"]["level"] == "exact"
    assert not compare(Checkpoint.open(out)).fault
    model, stock = loaded(out), seen(loaded(source))
    (block,) = blocks(model)
    assert type(block).__name__ == "MoeLlavaMultiModalProjector"
    assert block.linears.hidden != block.linears.given
    assert apart(seen(model), stock) <= 1e-5
    own = "multi_modal_projector.linear_1.weight" in load_file(out / "model.safetensors")
    assert own == (way != "full")
    shaken(model, ".experts.")
    assert apart(seen(model), stock) > 1e-3
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (out, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert torch.equal(seen(loaded(tmp_path / "again")), seen(model))
    told = model.generate(TEXT, pixel_values=PIXELS, max_new_tokens=3, do_sample=False)
    assert told.shape[1] == TEXT.shape[1] + 3


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llava", {"form": "null"}, "as wide as"),
        ("llava", {"form": "adapter", "adapter_at": "before"}, "as wide as"),
        ("llava", {"site": "attention"}, "no place for groups"),
        ("llava", {"form": "lora", "rank": 4, "key": "modality"}, "--tower text"),
        ("llama", {"form": "lora", "rank": 4}, "no projector tower"),
    ],
)
def test_what_cannot_stand_there_is_refused_before_any_work(
    family: str, options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises((MoetoolError, UsageError)) as raised:
        moetool.upcycle(str(models(family)), str(out), tower="projector", experts=2, **options)
    error = raised.value
    assert said in f"{error} {getattr(error, 'where', '')} {error.hint}"
    assert not out.exists()
