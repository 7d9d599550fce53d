"""What a run will need is asked for before it begins: text, memory of the gates, devices, engines."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Done

Run = Callable[..., Done]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}\n' * 4)
    return tmp_path / "ids.jsonl"


def refused(done: Done, folder: Path, *said: str) -> None:
    assert done.returncode in (1, 2) and "next:" in done.stderr, done.stderr
    assert all(word in done.stderr for word in said), done.stderr
    assert not [p.name for p in folder.iterdir() if "out" in p.name]


@pytest.mark.parametrize("verb", ["prune", "merge"])
def test_text_of_a_gate_is_read_before_anything_is_decided(
    verb: str,
    text: Path,
    models: Callable[..., Path],
    tmp_path: Path,
    moetool: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "bad.jsonl").write_text("not JSON\n")
    from moetool.methods.reduce.verb import Reduce

    def nothing(*_: object) -> None:
        raise AssertionError("something was decided")

    monkeypatch.setattr(Reduce, "decide", nothing)
    command = [verb, models("mixtral"), tmp_path / "out", "--calibrate", text]
    refused(moetool(*command, "--text", tmp_path / "bad.jsonl"), tmp_path, "bad.jsonl:1")
    refused(moetool(*command, "--text", tmp_path / "none.txt"), tmp_path, "no such file")


def test_gates_are_in_the_promise(
    text: Path, models: Callable[..., Path], tmp_path: Path, moetool: Run
) -> None:
    plain = ["prune", models("mixtral"), tmp_path / "out", "--method", "router-distance"]
    plain += ["--seq-len", 8, "--json"]
    gated = [*plain, "--text", text, "--max-kl", 100]
    without = moetool(*plain, "--dry-run").json["peak_memory"]
    promised = moetool(*gated, "--dry-run").json["peak_memory"]
    assert promised > without + 400_000_000
    refused(moetool(*gated, "--memory", without), tmp_path, "--memory")
    done = moetool(*gated)
    assert done.returncode == 0 and done.json["quality"], done.stderr


def test_attention_that_is_held_whole_is_in_the_promise(models: Callable[..., Path]) -> None:
    import numpy as np

    from moetool.forward.batches import Batch, Batches
    from moetool.forward.needs import needs
    from moetool.surgery.checkpoint import Checkpoint

    def promised(family: str, length: int) -> int:
        ids = np.zeros((2, length), np.int64)
        batch = Batch(ids, np.array([length] * 2), 0)
        made = Batches((batch,), ("a",), (2 * length,), length, "")
        return needs(Checkpoint.open(models(family)), made).fit(None).peak

    matrices = 4 * 2 * 4 * (2048**2 - 1024**2)  # float32, two sequences, four heads
    assert promised("gpt_oss", 2048) - promised("gpt_oss", 1024) > 3.4 * matrices
    assert promised("mixtral", 2048) - promised("mixtral", 1024) < matrices


@pytest.mark.parametrize("device", ["cuda:7", "cuda", "gpu", "cpu:x", "meta", ""])
@pytest.mark.parametrize("verb", ["prune", "merge", "upcycle", "convert-layout", "eval", "profile"])
def test_devices_that_are_not_there(
    verb: str, device: str, text: Path, models: Callable[..., Path], tmp_path: Path, moetool: Run
) -> None:
    if device == "cuda" and _has_cuda():
        pytest.skip("there is one")
    arguments: dict[str, list[Any]] = {
        "upcycle": [models("qwen3"), tmp_path / "out"],
        "convert-layout": [models("mixtral"), tmp_path / "out", "--to", "fused"],
        "eval": [models("mixtral"), "--text", text],
    }
    usual = [models("mixtral"), tmp_path / "out", "--calibrate", text]
    done = moetool(verb, *arguments.get(verb, usual), "--device", device)
    refused(done, tmp_path, "--device")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def test_a_cluster_without_its_library(
    models: Callable[..., Path], tmp_path: Path, moetool: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "moetool.surgery.device.find_spec", lambda name: None if name == "ray" else there(name)
    )
    done = moetool("prune", models("mixtral"), tmp_path / "out", "--engine", "ray")
    refused(done, tmp_path, "needs Ray")
