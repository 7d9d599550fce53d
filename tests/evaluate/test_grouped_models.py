"""Text through models with groups of experts, which run whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from methods.upcycled import trained

import moetool
from moetool.forward.batches import Cut
from moetool.forward.profile import Calibration
from moetool.surgery.checkpoint import Checkpoint

Models = Callable[..., Path]


def ids_of(folder: Path, rows: list[list[int]]) -> Path:
    text = folder / "ids.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return text


@pytest.mark.parametrize(
    "options",
    [
        {"form": "ternary", "top_k": 1},
        {"key": "modality", "experts": 1, "top_k": 1, "modality_ids": "7"},
    ],
)
def test_eval_is_the_whole_models_own(
    options: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    """Against the Auto class, in float64; rows of unlike length share a batch."""
    source, own = models("qwen2"), tmp_path / "own"
    trained(source, own, **{"experts": 2, **options})
    drawn = torch.Generator().manual_seed(4)
    rows = [torch.randint(5, 60, (n,), generator=drawn).tolist() for n in (31, 24, 9)]
    text = ids_of(tmp_path, rows)
    found = moetool.eval(
        str(own), text=[str(text)], reference=str(source), pack=False, batch_tokens=512
    )
    total = 0.0
    for row in rows:
        one, other = (logits(folder, row) for folder in (source, own))
        total += float((one.exp() * (one - other)).sum())
    assert found["kl"] == pytest.approx(total / sum(len(r) - 1 for r in rows), abs=1e-6)
    assert found["tokens"] == sum(len(r) - 1 for r in rows)
    with pytest.raises(moetool.MoetoolError, match="does not fit into --memory"):
        moetool.eval(str(own), text=[str(text)], pack=False, memory=1_000_000)


def logits(folder: Path, row: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        made = model.eval()(input_ids=torch.tensor([row])).logits
    return made[0, :-1].double().log_softmax(-1)


@pytest.mark.loads
def test_a_birth_that_is_not_exact_is_measured(models: Models, tmp_path: Path) -> None:
    source, own = models("qwen2"), tmp_path / "own"
    report = moetool.upcycle(str(source), str(own), form="ternary", experts=2, top_k=1)
    batches = Calibration(("random",), Cut(2048, 256, True, False, 0)).read(
        Checkpoint.open(str(source))
    )
    rows = batches.batches[0].ids.tolist()
    total = 0.0
    for row in rows:
        one, other = (logits(folder, row) for folder in (source, own))
        total += float((one.exp() * (one - other)).sum())
    quality = report["quality"]
    assert quality["drawn"] == "random ids" and quality["tokens"] == 8 * 255
    assert quality["kl"] == pytest.approx(total / (8 * 255), rel=1e-4) and quality["kl"] > 1e-5
    assert (
        f"KL {quality['kl']:.2g} on 2,040 predictions of random ids"
        in (own / "README.md").read_text()
    )
    assert moetool.verify(str(own), against=[str(source)])["verified"] == "bytes"
    exact = moetool.upcycle(
        str(source), str(tmp_path / "exact"), form="ternary", experts=2, top_k=1, exact=True
    )
    assert "quality" not in exact
    tight = moetool.upcycle(
        str(source), str(tmp_path / "t"), form="ternary", experts=2, top_k=1, memory="500MB"
    )
    assert "quality" not in tight and "was not measured: it runs whole" in tight["warnings"][0]
