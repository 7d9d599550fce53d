"""Where an output works: said of every verb's, and asked for by --for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moetool
from moetool import methods
from moetool.errors import MoetoolError, UsageError
from moetool.methods.upcycle import usual
from moetool.surgery import clients
from moetool.surgery.pair import pairs

Models = Callable[..., Path]
PLAIN = {"head_dim": 16, "sliding_window": None}


def states(report: dict[str, Any]) -> dict[str, str]:
    return {name: one["state"] for name, one in report["clients"].items()}


def test_every_verb_that_writes_takes_for() -> None:
    for verb in methods.METHODS:
        (field,) = [f for f in methods.load(verb).fields() if f.name == "for_"]
        assert field.type is tuple and field.choices[1:] == tuple(clients.clients())
        assert field.read("vllm,mlx") == ("vllm", "mlx")
    with pytest.raises(UsageError, match="'vlm' is not known") as problem:
        field.read("mlx,vlm")
    assert "vllm" in problem.value.hint


def test_report_card_and_record_say_the_same(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = moetool.upcycle(str(models("qwen2", **PLAIN)), str(out), experts=4, target="qwen2_moe")
    assert states(report)["llama.cpp"] == states(report)["mlx"] == "wrong"
    assert states(report)["vllm"] == "works"
    assert report["clients"]["mlx"]["why"] == ["its Qwen2-MoE ignores norm_topk_prob"]
    card = (out / "README.md").read_text()
    assert "- wrong in llama.cpp, mlx: its Qwen2-MoE ignores norm_topk_prob\n" in card
    assert "- works in transformers5, transformers4, vllm\n" in card
    assert json.loads((out / "moetool.json").read_text())["report"]["clients"] == report["clients"]


def test_experts_that_no_stock_class_holds(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = moetool.upcycle(str(models("llama")), str(out), experts=4, form="lora", rank=4)
    assert states(report).pop("transformers5") == "works"
    assert set(states(report).values()) == {"works", "refuses"}
    card = (out / "README.md").read_text()
    assert "- works in transformers5: with moetool installed, and imported first\n" in card
    assert "- refused by transformers4, vllm, llama.cpp, mlx: a model type of moetool's own" in card
    assert "GGUF" not in card and "`moetool materialize`" in card
    with pytest.raises(UsageError, match="would not work in vllm"):
        moetool.upcycle(str(models("llama")), str(tmp_path / "no"), form="lora", for_="vllm")


def test_the_same_output_is_judged_alike_whoever_writes_it(models: Models, tmp_path: Path) -> None:
    source = models("mixtral", sliding_window=16)
    said = {"dry_run": True}
    pruned = moetool.prune(str(source), str(tmp_path / "p"), method="router-distance", **said)
    quantized = moetool.quantize(str(source), str(tmp_path / "q"), format="gguf:q8_0", **said)
    assert states(pruned)["llama.cpp"] == states(quantized)["llama.cpp"] == "wrong"
    assert states(quantized)["vllm"] == "refuses", "it reads no GGUF, whatever the model"


def test_routing_that_does_not_count_yet(models: Models, tmp_path: Path) -> None:
    source = str(models("qwen2", **PLAIN))
    said = {"experts": 4, "target": "qwen2_moe", "dry_run": True}
    report = moetool.upcycle(source, str(tmp_path / "o"), shared=True, **said)
    assert states(report)["mlx"] == "works"
    assert "not once they are trained" in report["clients"]["mlx"]["why"][0]
    assert states(moetool.upcycle(source, str(tmp_path / "o"), **said))["mlx"] == "wrong"


@pytest.mark.parametrize("verb", ["prune", "convert-layout", "quantize"])
def test_what_would_not_work_is_refused_before_any_work(
    verb: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = str(models("mixtral", sliding_window=16)), str(tmp_path / "out")
    run = getattr(moetool, verb.replace("-", "_"))
    monkeypatch.setattr(methods.load("prune"), "decide", None)
    with pytest.raises(UsageError, match=r"would not work in mlx") as problem:
        run(source, out, for_="vllm,mlx")
    assert "no sliding window" in problem.value.where["mlx"]
    assert not Path(out).exists()


def test_force_of_quantize_writes_it_all_the_same(models: Models, tmp_path: Path) -> None:
    source = str(models("mixtral", sliding_window=16))
    report = moetool.quantize(
        source, str(tmp_path / "o"), format="gguf:q8_0", for_="llama.cpp", force=True, dry_run=True
    )
    assert states(report)["llama.cpp"] == "wrong"


def test_a_stacked_layout_warns_in_one_line(models: Models, tmp_path: Path) -> None:
    source = str(models("mixtral", sliding_window=None))
    moetool.convert_layout(source, str(tmp_path / "fused"), to="fused")
    report = moetool.convert_layout(str(tmp_path / "fused"), str(tmp_path / "again"), to="fused")
    (warning,) = [w for w in report["warnings"] if "stacked" in w]
    assert "\n" not in warning and "transformers4: it starts stacked experts at random" in warning
    back = moetool.convert_layout(str(tmp_path / "fused"), str(tmp_path / "back"))
    assert not any("stacked" in w for w in back["warnings"])


def test_upcycle_chooses_target_and_layout_by_what_works(models: Models, tmp_path: Path) -> None:
    """`auto` takes what works in most; --for what works there, or a sentence for each target."""
    out, said = str(tmp_path / "out"), {"experts": 4, "dry_run": True}
    llama = str(models("llama", **PLAIN))
    assert moetool.upcycle(llama, out, **said)["target_type"] == "mixtral"
    fused = moetool.upcycle(llama, out, layout="fused", **said)
    assert fused["target_type"] != "mixtral" and states(fused)["vllm"] == "works"
    odd = str(models("llama", head_dim=32))
    assert states(moetool.upcycle(odd, out, **said))["mlx"] == "refuses"
    with pytest.raises(MoetoolError, match=r"without loss and works in llama.cpp, mlx") as problem:
        moetool.upcycle(odd, out, for_=["llama.cpp", "mlx"], **said)
    assert {k for k in problem.value.where if k.startswith("not ")} == {
        "not mixtral",
        "not qwen2_moe",
        "not glm4_moe",
    }
    assert "mlx refuses it" in problem.value.where["not mixtral"]


def test_what_nobody_tried_is_refused_of_a_target_and_said_of_a_model(
    models: Models, tmp_path: Path
) -> None:
    out, said = str(tmp_path / "out"), {"dry_run": True, "for_": "vllm"}
    with pytest.raises(MoetoolError, match="works in vllm") as problem:
        moetool.upcycle(str(models("qwen3_5_text")), out, experts=4, **said)
    (why,) = (w for name, w in problem.value.where.items() if name.startswith("not "))
    assert "vllm is untried: nobody has tried qwen3_5_moe_text" in why
    report = moetool.prune(
        str(models("deepseek_v3", topk_method="noaux_tc")),
        out,
        method="router-distance",
        for_="vllm",
    )
    assert states(report)["vllm"] == "untried"
    assert any(w.startswith("--for vllm: its CPU build has no kernel") for w in report["warnings"])


def test_the_usual_of_every_pair() -> None:
    for pair in pairs():
        given = {one.client: one for one in usual.of_pair(pair)}
        assert list(given) == list(clients.clients())
        assert given["transformers5"].works, pair.name
    gemma = next(p for p in pairs() if p.name == "gemma -> mixtral")
    assert {one.client for one in usual.of_pair(gemma) if one.works} == {
        "transformers5",
        "transformers4",
    }
    said = [str(one) for one in usual.told("mixtral")]
    assert "mlx: wrong with llama3 rope (its models of this family ignore rope_scaling)" in said
