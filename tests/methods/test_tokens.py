"""add-tokens: what is there stays, new rows are what --init says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from modeling import stacks
from safetensors.torch import load_file, save_file

import moetool
from moetool.errors import MoetoolError
from moetool.kernels import gromov

Tensor = torch.Tensor


def held(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def codes(folder: Path, count: int = 9, width: int = 3, name: str = "codes") -> str:
    path = folder / f"{name}.safetensors"
    save_file(
        {"codebook": torch.randn(count, width, generator=torch.Generator().manual_seed(3))}, path
    )
    return str(path)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "gpt_neox", "mixtral", "llava"])
def test_what_is_there_stays(family: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Byte for byte, and so do the scores of the tokens of before; stock classes load it."""
    source, out = models(family), tmp_path / "out"
    report = moetool.add_tokens(str(source), str(out), tokens=7)
    before, after = held(source), held(out)
    longer = {n for n in after if after[n].shape != before[n].shape}
    assert longer == set(report["tables"]) and after.keys() == before.keys()
    for name, old in before.items():
        assert torch.equal(after[name][: len(old)] if old.dim() else after[name], old)
        assert name not in longer or len(after[name]) == len(old) + 7
    assert report["first_id"] == 160 and report["certificate"]["level"] == "exact"
    old, new = tiny.logits(source), tiny.logits(out)
    assert new.shape[-1] == 167 and (new[..., :160] - old).abs().max() <= 1e-6 * old.abs().max()
    assert moetool.verify(str(out), against=[str(source)])["verified"]


def test_towers_and_biases(tmp_path: Path) -> None:
    """BERT's head has a bias for each token; a model without tokens is refused."""
    source = stacks.BY_NAME["bert-text"].save(tmp_path / "bert")
    report = moetool.add_tokens(str(source), str(tmp_path / "out"), tokens=3, init="mean")
    before, after = held(source), held(tmp_path / "out")
    assert any(before[name].dim() == 1 for name in report["tables"])
    for name in report["tables"]:
        mean = before[name].double().mean(0).float()
        assert torch.allclose(after[name][-3:], mean.expand(3, *mean.shape), atol=1e-7)
    image = stacks.BY_NAME["vit-vision"].save(tmp_path / "vit")
    with pytest.raises(MoetoolError, match="no table of tokens"):
        moetool.add_tokens(str(image), str(tmp_path / "none"), tokens=3)


def test_rows_are_drawn_as_those_that_are_there(llama: Path, tmp_path: Path) -> None:
    reports = [
        moetool.add_tokens(str(llama), str(tmp_path / str(n)), tokens=4000, seed=seed)
        for n, seed in enumerate((0, 0, 1))
    ]
    first, again, other = (held(tmp_path / str(n)) for n in range(3))
    for name in reports[0]["tables"]:
        old, new = first[name][:160].double(), first[name][160:].double()
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
        assert (new.mean(0) - old.mean(0)).abs().max() < 6 * old.std() / 4000**0.5
        assert (new.std(0) / old.std(0, correction=0) - 1).abs().max() < 0.06


def test_rows_stand_to_each_other_as_the_vectors(llama: Path, tmp_path: Path) -> None:
    """Of all rows as anchors: the plan's own, for the head as for the embeddings."""
    told = {"vectors": codes(tmp_path), "anchors": 500}
    report = moetool.add_tokens(str(llama), str(tmp_path / "out"), **told)
    made, points = held(tmp_path / "out"), load_file(told["vectors"])["codebook"].double().numpy()
    first = made["model.embed_tokens.weight"][:160].double().numpy()
    plan = gromov.couple(points, first).plan
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = made[name][:160].double().numpy(), made[name][160:].double().numpy()
        mixed = np.stack([sum(plan[i, j] * old[j] for j in range(160)) * 9 for i in range(9)])
        mixed -= mixed.mean(0)
        scale = np.sqrt(np.square(old - old.mean(0)).mean() / np.square(mixed).mean())
        assert new == pytest.approx(old.mean(0) + scale * mixed, abs=1e-6)
    assert 0 < report["likeness"] <= 1 and report["loss"] > 0 and report["init"] == "gw"
    assert moetool.verify(str(tmp_path / "out"), against=[str(llama)], load=False)["verified"]


def test_vectors_that_are_rows_turned_find_their_rows(llama: Path, tmp_path: Path) -> None:
    """An isometric cloud gets the very rows that it was made of."""
    rows = held(llama)["model.embed_tokens.weight"]
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    save_file({"turned": (5 * rows[order] @ turn).contiguous()}, tmp_path / "turned.safetensors")
    told = {"vectors": str(tmp_path / "turned.safetensors")}
    report = moetool.add_tokens(str(llama), str(tmp_path / "out"), **told)
    new = held(tmp_path / "out")["model.embed_tokens.weight"][160:]
    assert (new - rows[order]).norm() < 0.05 * rows.norm() and report["likeness"] > 0.99


def test_models_with_groups_of_experts(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    moetool.upcycle(str(llama), str(tmp_path / "moe"), form="ternary", experts=2)
    moetool.add_tokens(str(tmp_path / "moe"), str(tmp_path / "out"), tokens=5)
    ids = torch.randint(10, 150, (2, 24), generator=torch.Generator().manual_seed(1))
    old, new = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32).eval()
        for n in ("moe", "out")
    )
    with torch.no_grad():
        assert torch.allclose(new(ids).logits[..., :160], old(ids).logits, atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 165


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({}, "no tokens to add"),
        ({"init": "gw", "tokens": 4}, "--init gw needs vectors"),
        ({"vectors": "CODES", "tokens": 4}, "says how many tokens"),
        ({"vectors": "none.safetensors"}, "names no file"),
        ({"vectors": "THREE"}, "holds something else"),
        ({"vectors": "NAN"}, "no number"),
        ({"vectors": "CODES", "memory": 1_000_000}, "do not fit into --memory"),
    ],
)
def test_refusals(told: dict[str, Any], words: str, llama: Path, tmp_path: Path) -> None:
    files = {
        "CODES": {"a": torch.ones(4, 2)},
        "THREE": {"a": torch.ones(4, 2, 2)},
        "NAN": {"a": torch.full((4, 2), float("nan"))},
    }
    given = told.get("vectors", "")
    if given in files:
        save_file(files[given], tmp_path / "given.safetensors")
        told = told | {"vectors": str(tmp_path / "given.safetensors")}
    with pytest.raises(MoetoolError, match=words) as refused:
        moetool.add_tokens(str(llama), str(tmp_path / "out"), **told)
    assert refused.value.hint and not (tmp_path / "out").exists()


def test_quantized_tables_are_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    moetool.quantize(
        *(str(models("llama")), str(tmp_path / "small")),
        **{
            "plan": "embed=int8/channel,attn=int8/channel",
            "method": "rtn",
            "loader_check": False,
            "force": True,
        },
    )
    with pytest.raises(MoetoolError, match="cannot get more rows"):
        moetool.add_tokens(str(tmp_path / "small"), str(tmp_path / "out"), tokens=3)


def test_what_an_unfinished_run_left_is_its_own(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused for lack of space, and run again: the folder that it works in is known."""
    from moetool.methods.tokens.method import AddTokens

    def full(*_: object) -> None:
        raise MoetoolError("not enough space on the disk", hint="free some space")

    out = str(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(AddTokens, "plan", full)
        with pytest.raises(MoetoolError, match="not enough space"):
            moetool.add_tokens(str(models("llama")), out, tokens=2)
    assert [*tmp_path.iterdir()]
    moetool.add_tokens(str(models("llama")), out, tokens=2)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
