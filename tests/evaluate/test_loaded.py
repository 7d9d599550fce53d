"""The named loader against us: a truncated copy is loaded by stock transformers in a process of its
own, and every parameter compared by value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moetool import quantize, verify
from moetool.errors import UsageError, VerificationFailed
from moetool.evaluate import loaded
from moetool.evaluate.truncated import Truncated
from moetool.surgery import clients, forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.forms import Spelled
from moetool.surgery.spec import Target

Models = Callable[..., Path]
SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
EXPERTS = {"moe_intermediate_size": 128}


def made(models: Models, family: str) -> Path:
    more = EXPERTS if family == "qwen3_moe" else {}
    sizes = {k: v for k, v in SIZES.items() if family != "mixtral" or k != "head_dim"}
    return models(family, dtype="bfloat16", **sizes, **more)


@pytest.mark.loads
@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("qwen3_moe", "int4/32"),
        pytest.param("llama", "fp8", marks=pytest.mark.slow),
        pytest.param("mixtral", "nf4", marks=pytest.mark.slow),
        pytest.param("mixtral", "bnb-int8", marks=pytest.mark.slow),
        pytest.param("mixtral", "mxfp4", marks=pytest.mark.slow),
    ],
)
def test_what_is_written_is_what_is_loaded(
    family: str, format: str, models: Models, tmp_path: Path
) -> None:
    """As few layers as there are kinds; every parameter; said in the report and on the card."""
    killed = tmp_path / ".out.moetool-work" / ".moetool-load-killed"  # by an earlier run
    killed.mkdir(parents=True)
    report = quantize(str(made(models, family)), str(tmp_path / "out"), format=format)
    said = report["proof"]["loaded"]
    assert said["loader"] == "transformers5" and said["version"].startswith("transformers 5")
    assert said["layers"] == (2 if family == "qwen3_moe" else 1)
    assert said["parameters"] > 10 and said["logits"] < 0.1
    assert said["version"] in (tmp_path / "out" / "README.md").read_text()
    assert not killed.parent.exists() and not list(tmp_path.glob("**/.moetool-load*"))
    if format == "int4/32":
        assert said["logits"] == 0
        again = verify(str(tmp_path / "out"), loader="transformers5")
        assert {**again["loaded"], "logits": 0.0} == said


@pytest.mark.loads
def test_experts_of_two_widths_are_found_out(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 takes one group for all experts and says nothing: only values show it."""
    right = forms.settled

    def two(asked: Spelled, target: Target) -> Spelled:
        wide = "layers.1" in target.name and "experts" in target.name
        return forms.asked("int8/32") if wide else right(asked, target)

    monkeypatch.setattr(forms, "settled", two)
    monkeypatch.setattr(clients, "refusals", lambda *args: [])
    source = models("mixtral", dtype="bfloat16", num_hidden_layers=2)
    monkeypatch.setattr(Truncated, "of", classmethod(every_layer))
    with pytest.raises(VerificationFailed, match="other weights") as problem:
        quantize(str(source), str(tmp_path / "out"), format="int4/32")
    assert problem.value.exit_code == 4 and "experts" in problem.value.where["tensor"]
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".safetensors", ".json")]


def every_layer(cls: type[Truncated], source: Checkpoint, config: dict[str, Any]) -> Truncated:
    return cls(source, 2, tuple(source.tensors), config)


def test_what_cannot_be_asked_is_said(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(str(made(models, "qwen3_moe")), str(tmp_path / "out"), format="int4/32")
    source = Checkpoint.open(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "not run here" in loaded.check(source, config, "vllm").why
    tight = loaded.check(source, config, "transformers5", loaded.Within(memory=10_000_000))
    assert "memory" in tight.why and tight.as_json()["skipped"] == tight.why
    right = loaded._version
    for package, said in (("transformers", "pip install"), ("compressed-tensors", "pip install")):
        monkeypatch.setattr(loaded, "_version", lambda p, n=package: "" if p == n else right(p))
        assert said in loaded.check(source, config, "transformers5").why
    with pytest.raises(UsageError, match="all is full"):
        from moetool import convert_layout

        convert_layout(str(made(models, "mixtral")), str(tmp_path / "full"), to="fused")
        verify(str(tmp_path / "full"), loader="transformers5")


@pytest.mark.parametrize(
    ("family", "layers", "more"),
    [
        ("llama", 1, {}),
        ("qwen3_moe", 2, {}),
        ("deepseek_v3", 2, {}),
        ("llama4_text", 2, {}),
        ("qwen3_5_text", 4, {}),
        ("llava", 1, {}),
    ],
)
def test_cut_to_one_layer_of_each_kind(
    family: str, layers: int, more: dict[str, Any], models: Models
) -> None:
    source = Checkpoint.open(models(family))
    cut = Truncated.of(source, source.config)
    assert cut is not None and cut.layers == layers
    text = cut.config.get("text_config") or cut.config
    assert text["num_hidden_layers"] == layers
    assert all(len(v) != 4 or layers == 4 for k, v in text.items() if k.endswith("types") and v)
    numbers = {n.split("layers.")[1].split(".")[0] for n in cut.names if "vision" not in n
               and "layers." in n}  # fmt: skip
    assert numbers == set(map(str, range(layers)))
    outside = [n for n in source.tensors if "layers." not in n or "vision" in n]
    assert set(outside) <= set(cut.names)
