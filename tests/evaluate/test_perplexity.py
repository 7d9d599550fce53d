"""eval: the numbers of stock transformers, KL and flips against a plain reference, gates, every
kind of model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import moetool as api
from moetool.demo import MODEL, TEXT

DICE = np.random.default_rng(7)
ROWS = [DICE.integers(10, 150, n).tolist() for n in (40, 40, 31, 12)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": r}) + "\n" for r in ROWS))
    return path


def plain(folder: Path) -> list[torch.Tensor]:
    model = tiny.load(folder)
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([r])).logits[0, :-1].double().log_softmax(-1) for r in ROWS
        ]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_vl_moe", "llama"])
def test_numbers_are_those_of_the_whole_model(
    family: str, models: Callable[..., Path], text: Path
) -> None:
    folder, other = models(family), models(family, seed=5)
    found = api.eval(str(other), text=[str(text)], reference=str(folder), pack=False, seq_len=64)
    ours, theirs = plain(other), plain(folder)
    right = [torch.tensor(r[1:]) for r in ROWS]

    def loss(rows):
        return -sum(
            float(p.gather(-1, t[:, None]).sum()) for p, t in zip(rows, right, strict=True)
        ) / sum(map(len, right))

    assert found["tokens"] == sum(map(len, right)) == sum(len(r) - 1 for r in ROWS)
    np.testing.assert_allclose(
        [found["perplexity"], found["reference_perplexity"]],
        [math.exp(loss(ours)), math.exp(loss(theirs))],
        rtol=1e-4,
    )
    kl = (
        sum(float((q.exp() * (q - p)).sum()) for p, q in zip(ours, theirs, strict=True))
        / found["tokens"]
    )
    same = (
        sum(int((p.argmax(-1) == q.argmax(-1)).sum()) for p, q in zip(ours, theirs, strict=True))
        / found["tokens"]
    )
    flips = (
        sum(
            int(((p.argmax(-1) == t) != (q.argmax(-1) == t)).sum())
            for p, q, t in zip(ours, theirs, right, strict=True)
        )
        / found["tokens"]
    )
    np.testing.assert_allclose(
        [found["kl"], found["top1_agreement"], found["flips"]],
        [kl, same, flips],
        rtol=1e-3,
        atol=1e-6,
    )


def test_a_model_is_no_distance_from_itself(models: Callable[..., Path], text: Path) -> None:
    found = api.eval(
        str(models("mixtral")),
        text=[str(text)],
        reference=str(models("mixtral")),
        pack=False,
        seq_len=64,
    )
    assert (
        abs(found["kl"]) < 1e-9
        and found["top1_agreement"] == 1.0
        and found["flips"] == 0.0
        and found["perplexity_increase"] == 0.0
    )


def test_the_embedded_model_and_its_upcycled_copy(
    tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    """Dense against MoE: exact upcycling shows as a KL of nothing, and the table says so."""
    api.upcycle("demo", str(tmp_path / "moe"), experts=4)
    done = moetool(
        "eval",
        tmp_path / "moe",
        "--text",
        TEXT,
        "--reference",
        "demo",
        "--tokens",
        "2000",
        "--seq-len",
        "256",
    )
    assert done.returncode == 0 and "perplexity" in done.stdout and "0.0000" in done.stdout, (
        done.stderr
    )
    both = moetool(
        "eval",
        "demo",
        "--text",
        TEXT,
        "--text",
        f"{TEXT}:0.5",
        "--tokens",
        "1000",
        "--seq-len",
        "128",
        "--json",
    )
    assert (
        both.returncode == 0
        and len(both.json["files"]) == 2
        and both.json["perplexity"] > 1
        and "kl" not in both.json
    )


def test_gates(models: Callable[..., Path], text: Path, moetool: Callable[..., Any]) -> None:
    args = [
        "eval",
        models("mixtral", seed=5),
        "--text",
        text,
        "--reference",
        models("mixtral"),
        "--seq-len",
        "64",
    ]
    missed = moetool(*args, "--max-kl", "0.0001")
    assert (
        missed.returncode == 4 and "KL divergence" in missed.stderr and "at most" in missed.stderr
    )
    assert moetool(*args, "--max-kl", "1000").returncode == 0
    alone = moetool("eval", models("mixtral"), "--text", text, "--max-kl", "1")
    assert alone.returncode == 2 and "--reference" in alone.stderr


def test_vocabularies_must_agree(models: Callable[..., Path], text: Path) -> None:
    with pytest.raises(api.MoetoolError, match="do not share a vocabulary"):
        api.eval(
            str(models("mixtral", vocab_size=168)),
            text=[str(text)],
            reference=str(models("mixtral")),
            pack=False,
        )


def test_no_text_and_bad_numbers(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(api.UsageError, match="no text given") as eval_:
        api.eval(str(models("mixtral")), text=[])
    with pytest.raises(api.UsageError, match="no text given") as profile:
        api.profile(str(models("mixtral")), str(tmp_path / "stats"))
    for refused, own, others in ((eval_, "text", "calibrate"), (profile, "calibrate", "text")):
        assert f"--{own} " in refused.value.hint and f"--{others}" not in refused.value.hint
    with pytest.raises(api.UsageError, match="too small"):
        api.eval(str(models("mixtral")), text=[str(text)], tokens=0)


def test_little_memory_gives_the_same_numbers(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    free = api.eval(str(models("mixtral")), text=[str(text)], pack=False, seq_len=64)
    tight = api.eval(
        str(models("mixtral")),
        text=[str(text)],
        pack=False,
        seq_len=64,
        memory=free["peak_memory"] - 20_000,
    )
    assert (
        tight["perplexity"] == free["perplexity"]
        and tight["peak_memory"] < free["peak_memory"]
        and not list(tmp_path.iterdir())
    )


@pytest.mark.parametrize("form", ["materialised", "factored"])
def test_base_and_delta(form: str, models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """D2-MoE: factored is smaller, refused by stock loaders, and read here; both forms compute the
    same.
    """
    source = models("qwen3_moe")
    report = api.merge(
        str(source),
        str(tmp_path / form),
        method="d2-moe",
        ratio=0.25,
        form=form,
        calibrate=[str(text)],
        tokens=200,
        seq_len=40,
        pack=False,
    )
    found = api.eval(
        str(tmp_path / form), text=[str(text)], reference=str(source), pack=False, seq_len=64
    )
    assert 0 < found["kl"] < 5
    assert api.verify(str(tmp_path / form), against=[str(source)])["bytes"]["sealed_tensors"] > 0
    if form == "materialised":
        tiny.load(tmp_path / form)
        return
    assert 0.70 < report["expert_bytes_after"] / report["expert_bytes_before"] <= 0.76
    with pytest.raises(Exception, match="moetool_base_delta"):
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(tmp_path / form)
    whole = api.merge(
        str(source),
        str(tmp_path / "whole"),
        method="d2-moe",
        ratio=0.25,
        calibrate=[str(text)],
        tokens=200,
        seq_len=40,
        pack=False,
    )
    other = api.eval(
        str(tmp_path / "whole"), text=[str(text)], reference=str(source), pack=False, seq_len=64
    )
    assert abs(other["kl"] - found["kl"]) < 1e-4 and whole["certificate"]["level"] == "none"


def test_the_whole_rank_is_the_whole_model(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Nothing saved, nothing lost: with ratio 0 the differences keep every direction that fits."""
    assert MODEL.exists()
    source = models("qwen3_moe", moe_intermediate_size=16, hidden_size=64)
    api.merge(
        str(source),
        str(tmp_path / "out"),
        combine="base-delta",
        method="alike",
        weigh="uniform",
        ratio=0.001,
    )
    assert math.isfinite(
        api.eval(str(tmp_path / "out"), text=[str(text)], reference=str(source), pack=False)["kl"]
    )
