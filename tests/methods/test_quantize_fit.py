"""--target-size and --max-kl alone: the plan that is chosen, its size to the byte, and that a single
format is never better.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import inside, tree

import moetool
from moetool.errors import MoetoolError, UsageError
from moetool.methods.quantize import fit
from moetool.methods.quantize.parts import sensitivity
from moetool.methods.quantize.rounded import RoundedView, held
from moetool.methods.quantize.scheme import Scheme, choose
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import rows

Models = Callable[..., Path]
OWN = ("README.md", "moetool.json", "report.json")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    dice = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    ids = torch.randint(10, 150, (24, 64), generator=dice).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return str(path)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three formats are enough for most of what is asked here."""
    ladder = [entry for entry in fit.LADDER if entry[0] in ("int2", "int4", "int8")]
    monkeypatch.setattr(fit, "LADDER", (ladder[0], ladder[2], ladder[4]))


def loaded(folder: Path) -> int:
    """Bytes of what a loader needs."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.name not in OWN)


def asked(text: str = "", **more: Any) -> dict[str, Any]:
    cut = {"calibrate": [text], "tokens": 1024, "seq_len": 64, "fit_tokens": 512}
    return {**(cut if text else {}), "method": "rtn", "loader_check": False, **more}


def test_the_choice_is_the_best_of_all_that_fit(models: Models, text: str, tmp_path: Path) -> None:
    """By exhaustion over its own table; and no single format that fits was measured to be better."""
    source, out = models("qwen3_moe", dtype="bfloat16"), tmp_path / "out"
    target = 240_000
    report = moetool.quantize(str(source), str(out), **asked(text, target_size=target))
    found = report["fit"]
    assert loaded(out) == found["bytes"] <= target
    rows_ = found["sensitivity"]
    roles = {r["role"]: [s for s in rows_ if s["role"] == r["role"]] for r in rows_}
    assert set(roles) == {"experts", "attn", "dense"} and found["unit"] == "KL"
    chosen = next(p for p in found["considered"] if p["plan"] == found["plan"])
    base = chosen["bytes"] - sum(
        next(r["bytes"] for r in roles[role] if r["format"] == word)
        for role, word in (part.split("=") for part in found["plan"].split(","))
        if word != "full"
    )
    best = min(
        sum(r["loss"] for r in parts)
        for parts in product(*roles.values())
        if base + sum(r["bytes"] for r in parts) < target - 300
    )
    tried = [p for p in found["considered"] if "measured" in p]
    assert min(p["predicted"] for p in tried) <= best * (1 + 1e-9)
    assert chosen["measured"] == min(p["measured"] for p in tried)
    words = [{part.partition("=")[2] for part in p["plan"].split(",")} for p in tried]
    assert any(len(w) == 1 for w in words), "no single format was measured"


def test_what_is_measured_is_what_is_written(
    models: Models, text: str, tmp_path: Path, short: None
) -> None:
    """The KL of a plan that was never written is that of the output, on the same tokens."""
    source, out = models("qwen3_moe"), tmp_path / "out"
    said = asked(text, target_size=300_000)
    report = moetool.quantize(str(source), str(out), **said)
    found = report["fit"]
    chosen = next(p for p in found["considered"] if p["plan"] == found["plan"])
    whole = moetool.eval(
        str(out), reference=str(source), text=(text,), tokens=found["tokens"], seq_len=64
    )
    assert found["tokens"] == 512
    assert chosen["measured"] == pytest.approx(whole["kl"], rel=0.25)  # other sequences of the file
    again = moetool.verify(str(out), against=[str(source)], load=False)
    assert again["verified"] == "bytes"
    assert moetool.quantize(str(source), str(out), **said)["warnings"][0].startswith("the output")


@pytest.mark.parametrize("stacked", [False, True])
def test_reading_rounded_is_reading_what_was_written(
    stacked: bool, models: Models, tmp_path: Path
) -> None:
    source = models("qwen3_moe")
    if stacked:
        moetool.convert_layout(str(source), str(tmp_path / "fused"), to="fused")
        source = tmp_path / "fused"
    plan = "experts=int3/16,attn=int4/channel"
    moetool.quantize(
        str(source), str(tmp_path / "out"), plan=plan, method="rtn", force=True, loader_check=False
    )
    checkpoint, written = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    scheme = Scheme({"experts": forms.asked("int3/16"), "attn": forms.asked("int4/channel")})
    said = fit.Quantizing(force=True)
    choice = choose(checkpoint, scheme, said)
    view = RoundedView.of(checkpoint, choice)
    for name in choice.formats:
        piece = choice.matrices[name].piece
        assert torch.equal(view.matrix(piece), written.matrix(name)), name
    stack = next(iter(view.runs))
    stored = checkpoint.tensor(stack)
    if stacked:
        both = view.matrix(stack).reshape(stored.shape)
        assert torch.equal(view.matrix(rows(stored, 1, 3)), both[1:3])
    untouched = next(n for n in checkpoint.tensors if "norm" in n)
    assert torch.equal(view.matrix(untouched), checkpoint.matrix(untouched))
    matrix = torch.randn(4, 32)
    assert held(matrix, forms.asked("int8/32")).dtype == torch.float32


def test_without_text_by_the_error_of_the_weights(models: Models, tmp_path: Path) -> None:
    source = models("llama", dtype="bfloat16")
    said = asked(target_size=120_000)
    report = moetool.quantize(str(source), str(tmp_path / "a"), **said)
    found = report["fit"]
    assert (found["unit"], found["tokens"]) == ("squared error", 0)
    assert loaded(tmp_path / "a") <= 120_000
    moetool.quantize(str(source), str(tmp_path / "b"), **said)
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert {n for n in a if a[n] != b[n]} <= {*OWN}
    larger = moetool.quantize(str(source), str(tmp_path / "c"), **asked(target_size=150_000))
    loss = {p["plan"]: p["predicted"] for p in larger["fit"]["considered"]}
    mine = {p["plan"]: p["predicted"] for p in found["considered"]}
    assert loss[larger["fit"]["plan"]] < mine[found["plan"]]


def test_the_smallest_plan_within_a_loss(
    models: Models, text: str, tmp_path: Path, short: None
) -> None:
    source = models("qwen3_moe", dtype="bfloat16")
    sizes, limits = [], (0.02, 0.002)
    for limit in limits:
        out = tmp_path / str(limit)
        report = moetool.quantize(str(source), str(out), **asked(text, max_kl=limit))
        found = report["fit"]
        chosen = next(p for p in found["considered"] if p["plan"] == found["plan"])
        assert chosen["measured"] <= limit and report["quality"]["kl"] <= limit
        smaller = [p for p in found["considered"] if p["bytes"] < chosen["bytes"]]
        assert all(p.get("measured", 1.0) > limit or p["predicted"] > limit for p in smaller)
        sizes.append(loaded(out))
    assert sizes[0] < sizes[1]
    with pytest.raises(MoetoolError, match="no plan is as near"):
        moetool.quantize(str(source), str(tmp_path / "x"), **asked(text, max_kl=1e-12))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"target_size": 1000}, "nothing that transformers5 reads is as small"),
        ({"target_size": "1GB"}, "the source already is as small"),
        ({"target_size": 90_000, "format": "int4"}, "chooses the formats"),
        ({"target_size": 90_000, "plan": "attn=int4"}, "chooses the formats"),
        ({"max_kl": 0.1}, "--max-kl alone"),
    ],
)
def test_refused_before_any_work(
    said: dict[str, Any], words: str, models: Models, tmp_path: Path
) -> None:
    with pytest.raises((MoetoolError, UsageError), match=words) as refused:
        moetool.quantize(str(models("llama")), str(tmp_path / "out"), **said)
    assert refused.value.hint and not list(tmp_path.iterdir())


def test_the_smallest_size_that_is_named_is_reached(models: Models, tmp_path: Path) -> None:
    source = models("llama", dtype="bfloat16")
    with pytest.raises(MoetoolError) as refused:
        moetool.quantize(str(source), str(tmp_path / "a"), **asked(target_size=1))
    least = int(str(refused.value.where["expected"]).split("at least ")[1].split()[0])
    moetool.quantize(str(source), str(tmp_path / "b"), **asked(target_size=least))
    assert loaded(tmp_path / "b") == least


@pytest.mark.parametrize(
    ("loader", "able"),
    [("vllm", {"int4", "int8"}), ("llama.cpp", {"gguf:q4_0", "gguf:q5_0", "gguf:q8_0"})],
)
def test_a_loader_narrows_the_choice(
    loader: str, able: set[str], models: Models, tmp_path: Path
) -> None:
    source = models("mixtral", dtype="bfloat16", sliding_window=None)
    size = loaded(source) * 6 // 10
    report = moetool.quantize(
        str(source), str(tmp_path / "out"), **asked(target_size=size, for_=loader)
    )
    rows_ = [r for r in report["fit"]["sensitivity"] if r["role"] == "experts"]
    assert {r["format"].partition("/")[0] for r in rows_} <= able
    assert report["loader"] == loader


def test_what_was_measured_is_not_measured_again(
    models: Models, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: None
) -> None:
    """Stopped at any question, the same command goes on from there."""
    source, asks = models("qwen3_moe", dtype="bfloat16"), []
    real = sensitivity.ByText._measured

    def counted(self: Any, model: Any) -> float:
        asks.append(1)
        if len(asks) == 3:
            raise KeyboardInterrupt
        return real(self, model)

    monkeypatch.setattr(sensitivity.ByText, "_measured", counted)
    said = asked(text, target_size=240_000)
    with pytest.raises(KeyboardInterrupt):
        moetool.quantize(str(source), str(tmp_path / "out"), **said)
    report = moetool.quantize(str(source), str(tmp_path / "out"), **said)
    assert len(asks) - 1 == len(report["fit"]["sensitivity"]) + sum(
        "measured" in p for p in report["fit"]["considered"]
    )
    assert not list(tmp_path.glob(".out*"))


def test_a_dry_run_shows_the_table(models: Models, tmp_path: Path) -> None:
    done = inside(
        "quantize", models("llama", dtype="bfloat16"), tmp_path / "out", "--target-size", "120kB",
        "--dry-run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "squared error of weights: int2/" in done.stdout and "  chosen       " in done.stdout
    assert not list(tmp_path.iterdir())
