"""How experts lie is chosen by the clients of --for, in every verb that writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moetool
from moetool.errors import MoetoolError, UsageError
from moetool.kernels import blockscale

Models = Callable[..., Path]
CLIENTS = "transformers4,vllm"
VERBS: dict[str, tuple[str, dict[str, Any]]] = {
    "prune": ("prune", {"method": "router-distance"}),
    "merge": ("merge", {"method": "alike"}),
    "quantize": ("quantize", {"format": "int8/channel", "method": "rtn"}),
    "auto": ("convert_layout", {"to": "auto"}),
}


@pytest.fixture(scope="module")
def stacked(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts are stacked, which transformers 4 starts at random."""
    out = tmp_path_factory.mktemp("lie") / "stacked"
    moetool.convert_layout(str(models("mixtral", sliding_window=None)), str(out), to="fused")
    return out


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("case", VERBS)
def test_the_output_is_that_of_the_model_with_single_experts(
    case: str, stacked: Path, models: Models, tmp_path: Path
) -> None:
    name, said = VERBS[case]
    verb, out, plain = getattr(moetool, name), tmp_path / "out", tmp_path / "plain"
    report = verb(str(stacked), str(out), for_=CLIENTS, **said)
    verb(str(models("mixtral", sliding_window=None)), str(plain), for_=CLIENTS, **said)
    assert same(_tensors(out), _tensors(plain))
    assert {report["clients"][name]["state"] for name in CLIENTS.split(",")} == {"works"}
    found = moetool.verify(str(out), against=[str(stacked)], load=False)
    assert found["verified"].startswith("bytes")


def test_a_replay_chooses_again(stacked: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    moetool.prune(str(stacked), str(first), for_=CLIENTS, method="router-distance")
    moetool.prune(str(stacked), str(again), for_=CLIENTS, decisions=str(first / "decisions.json"))
    assert same(_tensors(first), _tensors(again))


def test_auto_takes_what_most_read_and_explicit_words_stay(
    stacked: Path, models: Models, tmp_path: Path
) -> None:
    dry = {"dry_run": True}
    report = moetool.convert_layout(str(stacked), str(tmp_path / "a"), to="auto", **dry)
    assert report["layout"] == "per-expert"
    with pytest.raises(UsageError, match="would not work in vllm") as problem:
        moetool.convert_layout(str(stacked), str(tmp_path / "b"), to="fused", for_="vllm", **dry)
    assert "--to per-expert" in problem.value.hint
    kept = moetool.prune(str(stacked), str(tmp_path / "c"), method="router-distance", **dry)
    assert kept.get("steps") is None, "nobody asked"
    only = models("granitemoe")  # it has one way to lie
    found = moetool.prune(
        str(only), str(tmp_path / "d"), method="router-distance", for_="transformers5", **dry
    )
    assert found.get("steps") is None


def test_what_is_decoded_lies_as_asked(models: Models, tmp_path: Path) -> None:
    """Stacked fp8, as transformers 5 saves it: decoded values under single names."""
    wide = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128}
    packed, out, usual = (tmp_path / name for name in ("packed", "out", "usual"))
    moetool.convert_layout(str(models("qwen3_moe", **wide)), str(packed), to="fused")
    _pack(packed)
    report = moetool.dequantize(str(packed), str(out), for_=CLIENTS)
    moetool.dequantize(str(packed), str(usual))
    assert report["clients"]["transformers4"]["state"] == "works"
    single, stack = _tensors(out), _tensors(usual)
    both = stack["model.layers.1.mlp.experts.gate_up_proj"]
    for expert in range(len(both)):
        name = f"model.layers.1.mlp.experts.{expert}"
        gate, up = (single[f"{name}.{m}_proj.weight"] for m in ("gate", "up"))
        assert torch.equal(torch.cat([gate, up]), both[expert])
    converted = moetool.convert_layout(str(packed), str(tmp_path / "whole"))
    assert any("written in full" in w for w in converted["warnings"])


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def _pack(folder: Path) -> None:
    """Its stacked experts as fp8, a scale for 128 x 128."""
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(folder).items():
        if "experts" not in name:
            packed[name] = tensor
            continue
        parts = [
            blockscale.encode_fp8(matrix, [128, 128], torch.float32, power=False)
            for matrix in tensor
        ]
        packed[name] = torch.stack([codes for codes, _ in parts])
        packed[name + "_scale_inv"] = torch.stack([scales for _, scales in parts])
    (file,) = folder.glob("*.safetensors")
    save_file(packed, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    told = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config["quantization_config"] = told | {"modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(folder / "moetool.json", ignore_errors=True)


def test_another_target_is_named_where_one_does(models: Models, tmp_path: Path) -> None:
    source, said = str(models("qwen2", head_dim=16)), {"experts": 4, "dry_run": True}
    with pytest.raises(MoetoolError, match="and works in mlx") as problem:
        moetool.upcycle(source, str(tmp_path / "o"), target="qwen2_moe", for_="mlx", **said)
    assert problem.value.hint == "--target auto takes glm4_moe, which works in mlx"
    chosen = moetool.upcycle(source, str(tmp_path / "o"), for_="mlx", **said)
    assert chosen["target_type"] == "glm4_moe"
