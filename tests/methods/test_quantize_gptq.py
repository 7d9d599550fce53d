"""quantize --method gptq: what is solved, what the layers above see, how much it holds, and what it
refuses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from forward.test_solve import reference
from safetensors.torch import load_file

import moetool
from moetool.forward.linears import Linears
from moetool.forward.profile import Calibration
from moetool.methods.quantize.parts import solving, turns
from moetool.surgery.checkpoint import Checkpoint

Models = Callable[..., Path]
FORMAT = {"format": "int4/channel", "tokens": 480, "seq_len": 40}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gptq") / "ids.jsonl"
    dice = np.random.default_rng(3)
    rows = (dice.integers(10, 150, 40).tolist() for _ in range(12))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def solved(model: Path, out: Path, text: Path, **options: Any) -> Checkpoint:
    moetool.quantize(
        str(model),
        str(out),
        calibrate=[str(text)],
        **(options if "plan" in options else FORMAT | options),
    )
    return Checkpoint.open(out)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, two = tensors(a), tensors(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "llama"])
def test_nearer_than_rounding_on_the_text(
    family: str, models: Models, text: Path, tmp_path: Path
) -> None:
    """Each matrix of the first layers, by its squared error on its own inputs, which stock
    transformers shows in float64.
    """
    folder = models(family)
    made = solved(folder, tmp_path / "gptq", text)
    moetool.quantize(str(folder), str(tmp_path / "rtn"), method="rtn", format=FORMAT["format"])
    source, rounded = Checkpoint.open(folder), Checkpoint.open(tmp_path / "rtn")
    batches = Calibration((str(text),), solving.Cut(480, 40)).read(source)
    grams = reference(tiny.load(folder).double(), batches)
    better = []
    for name in made.tensors:
        if made.tensors[name].parts is None or ".layers.0." not in name:
            continue
        key = next(k for k in grams if k == (0, None, name))
        errors = [
            float(torch.einsum("oi,ij,oj->", d, grams[key], d))
            for d in (
                c.matrix(name).double() - source.matrix(name).double() for c in (made, rounded)
            )
        ]
        better.append(errors[0] / errors[1])
    assert len(better) >= 4 and max(better) < 1 and np.mean(better) < 0.8, better


def test_layers_above_see_what_is_written(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk goes on with the very values that the output decodes to."""
    seen: dict[str, torch.Tensor] = {}
    put = Linears.put

    def watched(self: Linears, weights: Mapping[str, torch.Tensor], block: Any) -> Any:
        seen.update({key: weights[key].clone() for key in weights})
        return put(self, weights, block)

    monkeypatch.setattr(Linears, "put", watched)
    made = solved(models("qwen3_moe"), tmp_path / "out", text)
    held = [name for name, stored in made.tensors.items() if stored.parts]
    assert sorted(seen) == sorted(held) and len(held) == 4 * 4 + 3 + 3 * 8 * 3
    assert all(torch.equal(seen[name], made.matrix(name)) for name in held)


def test_room_changes_no_byte(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts in many turns, as --memory may want it, or all at once."""
    monkeypatch.setattr(turns, "CHUNK", 2 * 4 * 64 * 64)
    monkeypatch.setattr(turns, "SIDE_BY_SIDE", 1)  # two experts are solved in one go
    solved(models("qwen3_moe"), tmp_path / "all", text)
    begun: list[int] = []
    begin = solving.Rounder.begin
    monkeypatch.setattr(solving, "_room", lambda *_: 0)
    monkeypatch.setattr(
        solving.Rounder,
        "begin",
        lambda self, layer, linears: (begun.append(layer), begin(self, layer, linears))[1],
    )
    solved(models("qwen3_moe"), tmp_path / "few", text)
    assert same(tmp_path / "all", tmp_path / "few")
    assert begun.count(1) == 5  # attention, then eight experts by two


def test_memory_is_promised_and_refused(models: Models, text: Path, tmp_path: Path) -> None:
    with pytest.raises(moetool.MoetoolError, match="does not fit into --memory"):
        solved(models("qwen3_moe"), tmp_path / "out", text, memory=300_000_000)
    assert not (tmp_path / "out").exists()


def test_each_role_has_its_format(models: Models, text: Path, tmp_path: Path) -> None:
    plan = "experts=int2/16,attn=int8/32,dense=int4/channel"
    told = {key: value for key, value in FORMAT.items() if key != "format"}
    made = solved(models("qwen3_moe"), tmp_path / "out", text, **told, plan=plan)
    held = {
        name.split(".", 3)[-1]: (stored.parts.params["bits"], stored.parts.params["group"])
        for name, stored in made.tensors.items()
        if stored.parts
    }
    assert held["self_attn.q_proj.weight"] == (8, 32)
    assert held["mlp.experts.3.down_proj.weight"] == (2, 16)
    assert held["mlp.up_proj.weight"] == (4, 0)
    assert "relation: merge" not in (tmp_path / "out" / "README.md").read_text()


def test_stacked_experts_are_solved_each_by_itself(
    models: Models, text: Path, tmp_path: Path
) -> None:
    """The same model with experts in stacks gives the same bytes."""
    moetool.convert_layout(str(models("qwen3_moe")), str(tmp_path / "fused"), to="fused")
    solved(tmp_path / "fused", tmp_path / "a", text)
    solved(models("qwen3_moe"), tmp_path / "b", text)
    assert same(tmp_path / "a", tmp_path / "b")


def test_starved_experts_are_counted(models: Models, text: Path, tmp_path: Path) -> None:
    """One sequence for eight experts."""
    report = moetool.quantize(
        str(models("qwen3_moe", hidden_size=32)),
        str(tmp_path / "out"),
        calibrate=[str(text)],
        format="int4/16",
        tokens=40,
        seq_len=40,
    )
    found = report["solved"]
    assert found["experts_with_few_tokens"] + found["experts_without_tokens"] == 24
    assert found["tokens"] == 40
    assert any("fewer tokens" in said for said in report["warnings"])
    assert moetool.verify(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 40, "calibrate": "text"}, "too little text"),
        ({"stats": "anywhere"}, "a profile does not hold"),
        ({"method": "gptq"}, "no text"),
    ],
)
def test_refused_before_any_work(
    options: dict[str, Any], said: str, models: Models, text: Path, tmp_path: Path
) -> None:
    if "calibrate" in options:
        options = options | {"calibrate": [str(text)], "seq_len": 40}
    with pytest.raises(moetool.MoetoolError) as found:
        moetool.quantize(
            str(models("llama")), str(tmp_path / "out"), format="int4/channel", **options
        )
    assert said in str(found.value) and "--method rtn" in found.value.hint
    assert list(tmp_path.iterdir()) == []


def test_formats_without_a_grid(models: Models, text: Path, tmp_path: Path) -> None:
    """Asked for gptq: refused; by auto: rtn, and why; beside others: those alone are solved."""
    model, asked = str(models("llama", dtype="bfloat16")), {"calibrate": [str(text)], "seq_len": 40}
    with pytest.raises(moetool.MoetoolError, match="nvfp4 has no grid") as found:
        moetool.quantize(model, str(tmp_path / "no"), format="nvfp4", method="gptq", **asked)
    assert "--method rtn" in found.value.hint and list(tmp_path.iterdir()) == []
    said = moetool.quantize(model, str(tmp_path / "auto"), format="nvfp4", tokens=480, **asked)
    assert said["rounding"] == "rtn" and any("nvfp4 has no grid" in w for w in said["warnings"])
    plan = "attn=nvfp4,dense=int4/channel"
    said = moetool.quantize(model, str(tmp_path / "both"), plan=plan, tokens=480, **asked)
    assert said["rounding"] == "gptq" and said["solved"]["solved"] > 0
    assert any("nvfp4 has no grid" in w for w in said["warnings"])
    assert not any("see no text" in w for w in said["warnings"])


def test_a_head_outside_of_the_layers_is_rounded(
    models: Models, text: Path, tmp_path: Path
) -> None:
    """--plan lm_head=...: as rtn does, and it is said."""
    report = moetool.quantize(
        str(models("llama")),
        str(tmp_path / "out"),
        plan="attn=int4/32,lm_head=int8/32",
        calibrate=[str(text)],
        tokens=480,
        seq_len=40,
    )
    assert any("lm_head" in said for said in report["warnings"])
    moetool.quantize(
        str(models("llama")), str(tmp_path / "rtn"), plan="lm_head=int8/32", method="rtn"
    )
    one, two = (tensors(tmp_path / n)["lm_head.weight_packed"] for n in ("out", "rtn"))
    assert torch.equal(one, two)


def test_a_missed_gate_keeps_what_was_solved_and_says_so(
    models: Models, text: Path, tmp_path: Path
) -> None:
    model, out, work = models("llama"), tmp_path / "out", tmp_path / ".out.moetool-work"
    asked: dict[str, Any] = {"text": [str(text)], "calibrate": [str(text)], "format": "int2/32"}
    with pytest.raises(moetool.VerificationFailed, match="too large") as problem:
        moetool.quantize(str(model), str(out), max_kl=1e-9, **asked)
    assert str(work) in problem.value.hint and "another gate" in problem.value.hint
    assert [p.name for p in tmp_path.iterdir()] == [work.name]
    assert [p.name for p in work.iterdir()] == ["walk"]
    moetool.quantize(str(model), str(out), max_kl=1e9, **asked)
    assert not work.exists()
