"""prune and merge where nobody gave text: the model writes its own, random ids stand in where it
cannot, and everybody is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import moetool as api
from moetool import methods
from moetool.errors import UsageError
from moetool.forward import own
from moetool.methods.reduce import lines
from moetool.methods.reduce.facts import Found, Refitted
from moetool.surgery.checkpoint import Checkpoint

Models = Callable[..., Path]
FEW: dict[str, Any] = {"tokens": 256, "seq_len": 64, "ratio": 0.5}


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Token ids, which take the place of text."""
    dice = np.random.default_rng(0)
    path = tmp_path / "ids.jsonl"
    rows = (dice.integers(10, 150, 64).tolist() for _ in range(16))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return str(path)


def of(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(("verb", "method"), [("prune", "reap"), ("merge", "mergemoe")])
def test_the_model_writes_its_own(
    verb: str, method: str, models: Models, tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    words = [verb, models("mixtral"), out, "--tokens", 256, "--seq-len", 64]
    done = moetool(*words)
    assert done.returncode == 0 and "the model wrote itself" in done.stdout, done.stderr
    report = of(out, "report.json")
    assert report["method"] == method and report["options"]["calibrate"] == ["own"]
    assert report["data"]["files"] == [{"name": "own", "tokens": 256, "drawn": "own"}]
    assert set(report["refit"]) == {"0", "1", "2", "3"}
    assert all(r["error_after"] < r["error_before"] for r in report["refit"].values())
    assert report["peak_memory"] >= own.needed(Checkpoint.open(models("mixtral")))
    card = (out / "README.md").read_text()
    assert "- calibrated on tokens that the model wrote itself: no text was given" in card
    named = [*words[:2], tmp_path / "named", *words[3:], "--calibrate", "own", "--refit"]
    assert moetool(*named, "--method", method).returncode == 0
    first, second = out / "model.safetensors", tmp_path / "named" / "model.safetensors"
    assert first.read_bytes() == second.read_bytes(), "the same as when it is named"


def test_random_ids_where_the_model_does_not_fit(models: Models, tmp_path: Path) -> None:
    source = str(models("mixtral"))
    memory = own.needed(Checkpoint.open(source)) - 1
    report = api.prune(source, str(tmp_path / "out"), memory=memory, **FEW)
    (said,) = [w for w in report["warnings"] if "random token ids" in w]
    assert "random token ids stand for text" in said and "--memory" in said
    assert report["options"]["calibrate"] == ["random"] and report["refit"]
    assert report["data"]["files"] == [{"name": "random", "tokens": 256, "drawn": "random"}]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- calibrated on random token ids: no text was given" in card


def test_nothing_runs_where_experts_cannot_be_computed_with(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moetool.surgery.experts import Mixture

    monkeypatch.setattr(Mixture, "plain", property(lambda _: False))
    report = api.prune(str(models("mixtral")), str(tmp_path / "out"), ratio=0.5)
    assert report["method_used"] == "router-distance" and "data" not in report


@pytest.mark.parametrize("name", ["own", "random"])
def test_a_mix_says_its_share(name: str, models: Models, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}\n' * 100)
    mixed = [str(tmp_path / "ids.jsonl"), f"{name}:0.25"]
    report = api.prune(str(models("mixtral")), str(tmp_path / "out"), calibrate=mixed, **FEW)
    assert [f["tokens"] for f in report["data"]["files"]] == [192, 64]
    what = {"own": "tokens that the model wrote itself", "random": "random token ids"}[name]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- 25% of the calibration tokens are no text: {what}" in card


def test_a_gate_is_measured_on_text_alone(models: Models, tmp_path: Path) -> None:
    source, out = str(models("mixtral")), str(tmp_path / "out")
    for calibrate in ([], ["random"], ["own"]):
        with pytest.raises(api.UsageError, match="a gate needs text"):
            api.prune(source, out, calibrate=calibrate, max_kl=9.0, **FEW)
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}\n' * 100)
    mixed = [str(tmp_path / "ids.jsonl"), "random:0.25"]
    report = api.prune(source, out, calibrate=mixed, max_kl=99.0, **FEW)
    assert [Path(f["file"]).name for f in report["quality"]["files"]] == ["ids.jsonl"]


def test_decisions_are_replayed_as_they_were_planned(
    models: Models, tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    """What the model writes is the same again, so the refit is; without it nothing runs."""
    source, file = str(models("mixtral")), tmp_path / "d.json"
    words = ["prune", source, tmp_path / "a", "--ratio", 0.5, "--tokens", 256, "--seq-len", 64]
    plan = moetool(*words, "--decisions", file, "--dry-run", "--json").json
    assert plan["method_used"] == "reap" and file.exists() and not (tmp_path / "a").exists()
    again = api.prune(source, str(tmp_path / "again"), decisions=str(file), ratio=0.5)
    api.prune(source, str(tmp_path / "a"), ratio=0.5, tokens=256, seq_len=64)
    assert again["refit"] == plan["refit"]
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("a", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    report = api.prune(source, str(tmp_path / "b"), decisions=str(file), ratio=0.5, refit=False)
    assert "data" not in report and "refit" not in report
    kept = {n: layer["keep"] for n, layer in of(file.parent, file.name)["layers"].items()}
    assert {n: layer["keep"] for n, layer in report["decisions"]["layers"].items()} == kept


def test_a_refit_on_text_is_missed_in_words(models: Models, text: str, tmp_path: Path) -> None:
    source, file = str(models("mixtral")), tmp_path / "d.json"
    said = {"tokens": 256, "seq_len": 64, "own_share": 0.0, "ratio": 0.5, "dry_run": True}
    api.prune(source, str(tmp_path / "a"), calibrate=text, decisions=str(file), **said)
    assert of(tmp_path, "d.json")["refit"]["on"] == "text"
    report = api.prune(source, str(tmp_path / "b"), decisions=str(file), ratio=0.5)
    assert "refit" not in report
    assert any("made for a refit on text" in warning for warning in report["warnings"])
    decisions = of(tmp_path, "d.json")
    (tmp_path / "e.json").write_text(json.dumps(decisions | {"refit": {"on": 7}}))
    with pytest.raises(UsageError, match="do not say what a refit"):
        api.prune(source, str(tmp_path / "c"), decisions=str(tmp_path / "e.json"))


def test_a_refit_is_solved_on_a_share_of_the_models_own(models: Models, tmp_path: Path) -> None:
    """And measured on sequences of both that it was not solved on."""
    rows = np.random.default_rng(0).integers(1, 160, (40, 64))
    text = tmp_path / "ids.jsonl"
    text.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows))
    told: dict[str, Any] = {"calibrate": [str(text)], "method": "reap", "refit": True}
    told |= {"ratio": 0.5, "seq_len": 64, "refit_tokens": 1280}
    source = str(models("mixtral"))
    report = api.prune(source, str(tmp_path / "mixed"), own_share=0.25, **told)
    assert [f.get("drawn", "") for f in report["refit_files"]] == ["", "own"]
    assert [f["tokens"] for f in report["refit_files"]] == [960, 320]
    assert report["refit_tokens"] == 1280 and len(report["data"]["files"]) == 1
    for one in report["refit"].values():
        assert set(one["left_out"]) == {"text", "own"}
    alone = api.prune(source, str(tmp_path / "alone"), own_share=0.0, **told)
    assert [f["tokens"] for f in alone["refit_files"]] == [1280]
    memory = own.needed(Checkpoint.open(source)) - 1
    drawn = api.prune(source, str(tmp_path / "drawn"), own_share=0.5, memory=memory, **told)
    assert [f.get("drawn", "") for f in drawn["refit_files"]] == ["", "random"]
    left = drawn["refit"]["0"]["left_out"]
    assert set(left) == {"text", "random"}
    assert all(0 < one["after"] < 2 * one["before"] for one in left.values())
    with pytest.raises(api.UsageError, match="no text"):
        api.prune(source, str(tmp_path / "out"), **told | {"own_share": 1.0})


@pytest.mark.parametrize(
    "told",
    [{}, {"calibrate": ("a.txt", "random:0.2")}, {"calibrate": ("a.txt",), "refit": False}],
)
def test_a_share_that_nothing_takes_is_refused(told: dict[str, Any]) -> None:
    for method in ("auto", "reap"):
        with pytest.raises(api.UsageError, match="--own-share"):
            methods.make("prune", {"method": method, "own_share": 0.3, **told})
    assert methods.make("prune", {"own_share": 0.0, **told})
    assert methods.make("prune", {"own_share": 0.3, "calibrate": ("a.txt",)})


def test_narrow_text_is_said() -> None:
    def found(**left: list[float]) -> Found:
        return Found(refit={n: Refitted(0.5, 0.1, 0, left) for n in range(3)})

    (said,) = lines.narrow(found(text=[0.4, 0.1], own=[0.4, 0.3]))
    assert "the text is narrow" in said and "40.0% -> 10.0%" in said and "--own-share" in said
    assert not lines.narrow(found(text=[0.4, 0.1], own=[0.4, 0.15]))
    assert not lines.narrow(found(text=[0.4, 0.1])) and not lines.narrow(found())
