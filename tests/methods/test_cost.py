"""What a refit costs is told from shapes, and is what torch counts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import inside
from torch.utils.flop_counter import FlopCounterMode

import moetool
from moetool.kernels import solve
from moetool.kernels.moe import Experts, Law, activation, select
from moetool.methods.reduce import cost, refitting
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture

Models = Callable[..., Path]


def counted(run: Callable[[], Any]) -> int:
    """Operations of matrix products (torch counts no factors)."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def test_solving_is_what_torch_counts() -> None:
    torch.manual_seed(0)
    tokens, hidden, width, kept, law = 300, 24, 16, 4, Law(top_k=2)
    x = torch.randn(tokens, hidden)
    gate_up, down = torch.randn(kept, 2 * width, hidden), torch.randn(kept, hidden, width)
    experts = Experts(gate_up, down, activation("silu"))
    routing = select(x, torch.randn(kept, hidden), law)
    told = cost.LayerSizes(0, hidden, width, 2, kept).solving(tokens)
    found = counted(lambda: solve.refit(x, routing, experts, law, torch.randn(tokens, hidden)))
    assert found == told.products and cost.SWEEPS == solve.SWEEPS
    assert told.factors == kept * width**3 / 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    dice = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    rows = ([dice.randrange(10, 150) for _ in range(64)] for _ in range(64))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return str(path)


def test_the_ratio_is_that_of_the_work(
    models: Models, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a whole run: the walk that decides against the refit with its own walk."""
    from moetool.forward import profile

    found: dict[str, int] = {}

    def watched(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            got: list[Any] = []
            found[name] = counted(lambda: got.append(real(*args, **kwargs)))
            return got[0]

        monkeypatch.setattr(owner, name, run)

    watched(profile, "make")
    watched(refitting, "solve_layers")
    source = models("mixtral")
    said = {"tokens": 2048, "seq_len": 64, "refit_tokens": 1024, "own_share": 0.0, "ratio": 0.5}
    report = moetool.prune(
        str(source), str(tmp_path / "out"), calibrate=text, method="reap", **said
    )
    mixture = Mixture.of(Checkpoint.open(source))
    told = cost.times(mixture, report["experts_after"], report["data"]["tokens"], 1024)
    assert report["refit_work"] == pytest.approx(told, rel=0.01)
    assert told == pytest.approx(found["solve_layers"] / found["make"], rel=0.3)
    assert {"profile", "refit", "decide", "write", "measure"} <= set(report["stages"])
    stages = report["stages"]
    assert 0 < stages["profile"] + stages["refit"] <= stages["decide"] + 0.01


def test_it_is_said_before_the_work(models: Models, text: str, tmp_path: Path) -> None:
    common = ["prune", models("mixtral"), tmp_path / "o", "--calibrate", text, "--tokens", 256]
    done = inside(*common, "--seq-len", 64, "--own-share", 0, "--dry-run", "--json")
    first, *_ = done.stderr.splitlines()
    assert first.startswith("deciding sends up to 256 tokens through the model, then a refit")
    assert "only --method router-distance decides at once" in first
    assert done.json["refit_work"] > 0 and done.json["warnings"] is not None
    real = inside(*common, "--seq-len", 64, "--no-refit")
    assert "deciding sends up to 256 tokens through the model\n" in real.stderr
    assert "done" in real.stdout and "profile" in real.stdout.splitlines()[-1]
    none = inside(*common[:3], "--method", "router-distance", "--dry-run")
    assert "deciding" not in none.stderr
