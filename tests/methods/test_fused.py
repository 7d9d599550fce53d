"""The experts of one noise level as one FFN of a stock class: the logits of the model at the level."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from modeling.grown import IDS, apart
from modeling.test_other_experts import loaded, logits, shaken

import moetool
from moetool.errors import MoetoolError

Models = Callable[..., Path]
NOISE: dict[str, Any] = {"form": "full", "key": "noise", "noise_dim": 8, "experts": 4}


def trained(source: Path, folder: Path, **options: Any) -> Path:
    """Experts and routers that differ, saved."""
    moetool.upcycle(str(source), str(folder / "born"), **NOISE | options)
    model = loaded(folder / "born")
    shaken(model, "router")
    shaken(model, ".experts.")
    model.save_pretrained(folder / "moe")
    return folder / "moe"


@pytest.mark.parametrize(
    ("family", "options", "width", "level"),
    [
        ("llama", {"top_k": 2}, 256, -0.8),
        ("llama", {"top_k": 3, "law": "softmax"}, 384, 0.3),
        ("gemma2", {"top_k": 1, "law": "hard"}, 128, 1.0),
        ("gpt_neox", {"law": "soft"}, 512, -0.8),
        ("starcoder2", {"top_k": 2}, 256, 0.3),
    ],
)
def test_as_the_model_at_that_level(
    family: str,
    options: dict[str, Any],
    width: int,
    level: float,
    models: Models,
    tmp_path: Path,
) -> None:
    moe, out = trained(models(family), tmp_path, **options), tmp_path / "dense"
    report = moetool.materialize(str(moe), str(out), noise=str(level))
    assert report["certificate"]["level"] == "exact_if" and report["target_type"] == family
    ours = logits(loaded(moe), IDS, noise=torch.full((len(IDS),), level))
    dense = tiny.load(out)
    assert apart(logits(dense, IDS), ours) < 1e-5
    assert dense.config.intermediate_size == width
    other = logits(loaded(moe), IDS, noise=torch.full((len(IDS),), level + 1.5))
    assert family == "gemma2" or apart(other, ours) > 1e-4  # top-1 may be the same
    assert moetool.verify(str(out), against=[str(moe)], load=False)["verified"]


@pytest.mark.parametrize(
    ("options", "told", "words"),
    [
        ({}, {"noise": "warm"}, "no number"),
        ({}, {"noise": "nan"}, "no number"),
        ({}, {"noise": "0.1", "target": "base"}, "writes the dense family"),
        ({"layers": "0,1"}, {"noise": "0.1"}, "no single FFN"),
        (
            {"key": "token", "target": "moetool", "noise_dim": None},
            {"noise": "0.1"},
            "no single FFN",
        ),
        ({"activation": "relu"}, {"noise": "0.1"}, "no single FFN"),
    ],
)
def test_refusals(
    options: dict[str, Any], told: dict[str, str], words: str, llama: Path, tmp_path: Path
) -> None:
    asked = {n: v for n, v in (NOISE | options).items() if v is not None}
    moetool.upcycle(str(llama), str(tmp_path / "moe"), **asked)
    with pytest.raises(MoetoolError, match=words) as refused:
        moetool.materialize(str(tmp_path / "moe"), str(tmp_path / "out"), **told)
    assert refused.value.hint and not (tmp_path / "out").exists()


def test_a_model_without_groups(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MoetoolError, match="no single FFN"):
        moetool.materialize(str(llama), str(tmp_path / "out"), noise="0.5")
