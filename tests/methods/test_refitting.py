"""Down matrices solved again: by default wherever there is text, never where nobody may."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_profiles import ids
from safetensors.torch import load_file

import moetool as api
from moetool.errors import UsageError

CUT = {"tokens": 800, "seq_len": 40, "sample": 200, "ratio": 0.5}


def experts(folder: Path) -> dict[tuple[str, int, str], torch.Tensor]:
    """(layer, expert, matrix) -> tensor, of a qwen3_moe."""
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            said = re.search(r"layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.weight", name)
            if said:
                found[said[1], int(said[2]), said[3]] = tensor
    return found


def test_text_refits_and_no_refit_moves_bytes(models: Callable[..., Path], tmp_path: Path) -> None:
    """The same experts stay; gate and up are the source's; down_proj differs, and only with refit;
    report and card say which of the two was done.
    """
    source, text = models("qwen3_moe"), [str(ids(tmp_path))]
    refit, plain = tmp_path / "refit", tmp_path / "plain"
    solved = api.prune(str(source), str(refit), calibrate=text, **CUT)
    moved = api.prune(str(source), str(plain), calibrate=text, refit=False, **CUT)
    layers = solved["decisions"]["layers"]
    assert layers == moved["decisions"]["layers"]
    assert solved["refit"].keys() == set(layers) and solved["refit_tokens"] >= 800
    assert all(r["error_after"] < r["error_before"] for r in solved["refit"].values())
    assert moved["not_refit"] == "--no-refit" and "refit" not in moved
    assert "solved again" in solved["certificate"]["why"]
    assert "byte for byte" in moved["certificate"]["why"]
    old, new, copied = experts(source), experts(refit), experts(plain)
    assert len(new) == len(copied) == len(old) // 2
    for (layer, number, matrix), tensor in copied.items():
        whence = old[layer, layers[layer]["keep"][number], matrix]
        assert torch.equal(tensor, whence)
        assert torch.equal(new[layer, number, matrix], whence) == (matrix != "down_proj")
    told = f"solved again on {solved['refit_tokens']:,} tokens"
    for folder, said in ((refit, told), (plain, "no: --no-refit")):
        assert said in (folder / "README.md").read_text()
        report = json.loads((folder / "report.json").read_text())
        assert ("refit" in report) == (folder == refit)


@pytest.mark.parametrize(
    ("verb", "told", "why"),
    [
        ("prune", {"method": "router-distance"}, "there is no text"),
        ("prune", {"method": "stun", "total_sparsity": 0.6, "calibrate": "TEXT"}, "stun writes"),
        ("merge", {"method": "d2-moe", "calibrate": "TEXT"}, "d2-moe writes"),
        ("prune", {"method": "reap", "stats": "STATS"}, "kept 8 tokens a layer"),
    ],
    ids=["no text", "stun", "d2-moe", "small sample"],
)
def test_who_cannot_goes_on_and_says_why(
    verb: str, told: dict[str, Any], why: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    source, text = str(models("qwen3_moe")), [str(ids(tmp_path))]
    if "stats" in told:
        told = told | {"stats": str(tmp_path / "stats")}
        api.profile(source, told["stats"], calibrate=text, tokens=400, seq_len=40, sample=8)
    cut = CUT if "calibrate" in told else {"ratio": 0.5}
    told = told | ({"calibrate": text} if "calibrate" in told else {})
    done = getattr(api, verb)(source, str(tmp_path / "out"), **cut, **told)
    assert why in done["not_refit"] and "refit" not in done


def test_least_squares_without_refit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="solved again"):
        api.merge("x", str(tmp_path), combine="least-squares", refit=False, calibrate=["y"])


def test_experts_with_few_tokens_are_counted(models: Callable[..., Path], tmp_path: Path) -> None:
    """On 40 tokens most experts see fewer than they are wide; the error falls all the same."""
    source, text = str(models("qwen3_moe")), [str(ids(tmp_path))]
    done = api.prune(source, str(tmp_path / "out"), calibrate=text, refit_tokens=40, **CUT)
    assert sum(r["few"] for r in done["refit"].values()) > 0
    assert all(r["error_after"] <= r["error_before"] for r in done["refit"].values())
    assert (
        "experts saw fewer tokens than they have neurons"
        in (tmp_path / "out/README.md").read_text()
    )
