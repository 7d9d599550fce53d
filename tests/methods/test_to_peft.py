"""Low-rank experts that all tokens run alike, as an adapter of PEFT: the same model, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from methods.upcycled import IDS, apart, own_logits, trained
from safetensors.torch import load_file, save_file

import moetool
from moetool.errors import MoetoolError, UsageError

Models = Callable[..., Path]
HEAD = "base_model.model."


def merged(source: Path, adapter: Path, factor: float = 1.0) -> torch.Tensor:
    """Logits of the base with every W + (alpha / r) B A, found by the names that PEFT gives."""
    said = json.loads((adapter / "adapter_config.json").read_text())
    held, model = load_file(adapter / "adapter_model.safetensors"), tiny.load(source)
    names = {name.rpartition(".lora_")[0] for name in held}
    for name in names:
        module = model.get_submodule(name.removeprefix(HEAD))
        change = held[f"{name}.lora_B.weight"] @ held[f"{name}.lora_A.weight"]
        change *= factor * said["lora_alpha"] / said["r"]
        module.weight.data += change.T if said["fan_in_fan_out"] else change
    assert set(said["target_modules"]) in (
        {name.removeprefix(HEAD) for name in names},
        {name.rpartition(".")[2] for name in names},
    )
    with torch.no_grad():
        made: torch.Tensor = model(input_ids=IDS).logits
    return made


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"alpha": 3.0, "law": "softmax"}),
        ("gpt2", {"law": "hard"}),
        ("phi3", {"key": "always", "layers": "1"}),
        ("qwen2", {"site": "linear", "layers": "1,3"}),
    ],
)
def test_one_expert_is_an_adapter(
    family: str, options: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    source, adapter = models(family), tmp_path / "adapter"
    own = trained(source, tmp_path / "own", form="lora", experts=1, top_k=1, rank=4, **options)
    report = moetool.materialize(str(own), str(adapter), target="peft")
    assert report["certificate"]["level"] == "exact" and "clients" not in report
    assert sorted(p.name for p in adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "moetool.json",
    ]
    wanted = own_logits(own)
    assert apart(merged(source, adapter), wanted) < 1e-5
    assert apart(tiny.logits(source), wanted) > 1e-3
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(source)
    assert moetool.verify(str(adapter), against=[str(own)])["verified"] == "bytes and function"
    assert moetool.materialize(str(own), str(adapter), target="peft")["seconds"] == 0.0
    (adapter / "adapter_config.json").write_text(json.dumps(said | {"r": 5}))
    with pytest.raises(moetool.VerificationFailed, match="adapter_config"):
        moetool.verify(str(adapter))


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_it(models: Models, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    source = models("llama")
    own = trained(source, tmp_path / "own", form="lora", experts=1, top_k=1, rank=4)
    moetool.materialize(str(own), str(tmp_path / "adapter"), target="peft", base=str(source))
    model = peft.PeftModel.from_pretrained(tiny.load(source), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert apart(model(input_ids=IDS).logits, own_logits(own)) == 0.0


def test_a_gate_is_part_of_the_adapter(models: Models, tmp_path: Path) -> None:
    source, adapter = models("llama"), tmp_path / "adapter"
    own = trained(source, tmp_path / "own", form="lora", experts=1, top_k=1, rank=4)
    moetool.materialize(str(own), str(tmp_path / "whole"), target="peft")
    moetool.materialize(str(own), str(adapter), target="peft", request_gates="0.25")
    assert apart(merged(source, adapter), merged(source, tmp_path / "whole", 0.25)) < 1e-6


def test_the_one_expert_of_a_request(models: Models, tmp_path: Path) -> None:
    """Routers that send every token to the last expert compute what its adapter does."""
    source, adapter = models("llama"), tmp_path / "adapter"
    said = {"experts": 2, "top_k": 1, "rank": 4, "law": "hard", "router_bias": True}
    own = trained(source, tmp_path / "own", form="lora", **said)
    (file,) = own.glob("*.safetensors")
    held = load_file(file)
    last = {n: torch.tensor([0.0, 1e4]) for n in held if n.endswith("router.bias")}
    save_file(held | last, file, {"format": "pt"})
    moetool.materialize(str(own), str(adapter), target="peft", request_gates="0,1")
    assert last and apart(merged(source, adapter), own_logits(own)) < 1e-5


@pytest.mark.parametrize("law", ["hard", "soft"])
def test_experts_that_always_work_are_one_change(law: str, models: Models, tmp_path: Path) -> None:
    said = {"key": "always", "law": law, "site": "linear", "experts": 3, "rank": 4}
    own = trained(models("llama"), tmp_path / "own", form="lora", **said)
    report = moetool.materialize(str(own), str(tmp_path / "adapter"), target="peft")
    assert report["certificate"]["level"] == "exact"
    assert apart(merged(models("llama"), tmp_path / "adapter"), own_logits(own)) < 1e-5


@pytest.mark.parametrize("gates", ["0.2,0,0.8", "0.2,0,0.8/0,1,0.5", "0,0,0/0,0,1"])
def test_the_experts_of_one_request_are_added_up(
    gates: str, models: Models, tmp_path: Path
) -> None:
    """Each linear W + sum of gates times (alpha / rank) B A, from the tensors of the experts."""
    source, adapter = models("llama"), tmp_path / "adapter"
    said = {"experts": 3, "top_k": 2, "rank": 4, "alpha": 6.0, "layers": "0,2"}
    own = trained(source, tmp_path / "own", form="lora", site="linear", **said)
    with pytest.raises(MoetoolError, match="weighs its 3 experts by itself") as problem:
        moetool.materialize(str(own), str(adapter), target="peft")
    assert "--request-gates" in problem.value.hint
    report = moetool.materialize(str(own), str(adapter), target="peft", request_gates=gates)
    assert report["certificate"]["level"] == "exact_if"
    held, model = load_file(next(own.glob("*.safetensors"))), tiny.load(source)
    changed = {name.partition(".experts.")[0] for name in held if ".experts." in name}
    for name in changed:
        row = gates.split("/")[-1 if ".2." in name else 0]
        for expert, gate in enumerate(map(float, row.split(","))):
            a, b = (held[f"{name}.experts.{expert}.lora_{part}"] for part in "AB")
            model.get_submodule(name).weight.data += gate * 6.0 / 4 * b @ a
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    assert len(changed) == 14 and apart(merged(source, adapter), wanted) < 1e-5
    assert apart(tiny.logits(source), wanted) > 1e-3


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        ({"form": "lora"}, {}, "chooses among 2 experts for each token"),
        ({"form": "lora"}, {"request_gates": "0.5,0.5"}, "not linear"),
        ({"form": "ternary"}, {}, "PEFT's adapters are low-rank"),
        ({"form": "adapter", "adapter_dim": 8}, {}, "PEFT's adapters are low-rank"),
        ({"form": "lora", "experts": 1}, {"request_gates": "1,0"}, "does not fit the experts"),
        ({"form": "lora"}, {"request_gates": "a"}, "no numbers"),
        ({"form": "lora"}, {"request_gates": "1,0/"}, "no numbers"),
        ({"form": "lora"}, {"request_gates": "1,0/0,1"}, "does not fit the experts"),
        ({"form": "lora"}, {"target": "mixtral", "base": "x"}, "are of an adapter"),
        ({"form": "lora"}, {"for_": "vllm"}, "an adapter is none by itself"),
    ],
)
def test_what_no_adapter_computes(
    options: dict[str, Any], more: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    moetool.upcycle(str(models("llama")), str(own), **{"experts": 2, "top_k": 1, **options})
    with pytest.raises((MoetoolError, UsageError)) as raised:
        moetool.materialize(str(own), str(tmp_path / "out"), **{"target": "peft", **more})
    assert said in str(raised.value) and raised.value.hint
    assert not (tmp_path / "out").exists()
