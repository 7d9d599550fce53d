"""`inspect` counts what is there: parameters by hand, layers one by one, names it does not know."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import tiny

import moetool
from moetool.surgery.checkpoint import Checkpoint

# Granite stacks its experts under names without the word.
EXPERTS = re.compile(r"(?<!shared_)experts\.|block_sparse_moe\.(in|out)put_linear")
# The layout of Llama 4 is derived from a model whose layers all have experts.
DENSE_LAYERS_UNKNOWN = {"llama4_text"}


def elements(folder: Path, pattern: str | re.Pattern[str] = "") -> int:
    """Numbers in all tensors whose name has the pattern."""
    tensors = Checkpoint.open(folder).tensors.values()
    return sum(prod(t.shape) for t in tensors if re.search(pattern, t.name))


@pytest.mark.parametrize("family", tiny.MOE)
def test_parameters_are_counted_by_hand(family: str, models: Callable[..., Path]) -> None:
    folder = models(family)
    found = moetool.inspect(str(folder))
    assert found["kind"] == "moe" and found["known"]
    assert bool(found["unknown_tensors"]) == (family in DENSE_LAYERS_UNKNOWN)
    assert found["parameters"] == elements(folder)
    experts = elements(folder, EXPERTS)
    count = max(layer["experts"] for layer in found["layers"])
    resting = found["parameters"] - found["active_parameters"]
    assert 0 < resting < experts
    assert resting == experts * (count - found["top_k"]) // count


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "granite"])
def test_dense_models_use_everything(family: str, models: Callable[..., Path]) -> None:
    folder = models(family)
    found = moetool.inspect(str(folder))
    assert found["kind"] == "dense" and found["top_k"] is None and found["family"] == family
    assert found["parameters"] == found["active_parameters"] == elements(folder)
    config = json.loads((folder / "config.json").read_text())
    assert len(found["layers"]) == config["num_hidden_layers"]
    assert {row["ffn"] for row in found["layers"]} == {config["intermediate_size"]}
    assert (found["hidden"], found["vocab"]) == (config["hidden_size"], config["vocab_size"])


def upcycled(out: Path, **options: Any) -> dict[str, Any]:
    moetool.upcycle("demo", str(out), **options)
    return moetool.inspect(str(out))


def test_a_layer_says_what_it_holds(tmp_path: Path) -> None:
    found = upcycled(tmp_path / "moe", experts=4, layers="every:2")
    kinds = [(row["ffn"] is None, row["experts"]) for row in found["layers"]]
    assert kinds.count((True, 4)) == 2 and kinds.count((False, 0)) == 2
    moe = next(row for row in found["layers"] if row["experts"])
    assert moe["expert_width"] == 384 and not moe["stacked"] and moe["router"].endswith("[4, 128]")


def test_stacked_experts_count_the_same(tmp_path: Path) -> None:
    single = upcycled(tmp_path / "single", experts=4)
    stacked = upcycled(tmp_path / "stacked", experts=4, layout="fused", target=single["family"])
    assert all(row["stacked"] for row in stacked["layers"])
    assert not any(row["stacked"] for row in single["layers"])
    for key in ("parameters", "active_parameters", "top_k", "hidden", "vocab"):
        assert stacked[key] == single[key]
    assert stacked["tensors"] < single["tensors"]
    assert [r["expert_width"] for r in stacked["layers"]] == [384] * 4


def test_a_shared_expert_is_seen(tmp_path: Path) -> None:
    found = upcycled(tmp_path / "moe", experts=4, shared=True, split=2, target="glm4_moe")
    assert {row["shared"] for row in found["layers"]} == {384}
    assert all(row["router_bias"] for row in found["layers"])


@pytest.fixture
def copy(tmp_path: Path, models: Callable[..., Path]) -> Path:
    return Path(shutil.copytree(models("qwen3_moe"), tmp_path / "model"))


def test_unknown_names_are_listed(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.surprise.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = moetool.inspect(str(copy))
    assert found["unknown_tensors"] == ["model.layers.0.mlp.surprise.weight"]
    assert found["parameters"] == elements(copy)


@pytest.mark.parametrize("model_type", ["brand_new", None, ["qwen3_moe"]])
def test_an_unknown_family_is_counted_all_the_same(model_type: Any, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    found = moetool.inspect(str(copy))
    assert found["known"] is False and found["parameters"] == elements(copy)
    assert len(found["unknown_tensors"]) == found["tensors"]


@pytest.mark.parametrize("model_type", [7, 1.5])
def test_a_family_that_is_no_text(model_type: Any, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(moetool.MoetoolError, match="cannot be what it is") as refused:
        moetool.inspect(str(copy))
    assert refused.value.where["field"] == "model_type" and refused.value.hint


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_local_experts": 7}, "says num_local_experts 7, and layer 1 holds 8 experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9, and a layer has only 8 experts"),
        ({"hidden_size": 32}, "says hidden_size 32, and model.embed_tokens.weight is [160, 64]"),
        ({"vocab_size": 161}, "says vocab_size 161, and model.embed_tokens.weight is [160, 64]"),
        ({"num_hidden_layers": 9}, "num_hidden_layers 9, and there are tensors of 4 layers only"),
        ({"num_hidden_layers": 2}, "layers: 2 of them would not run"),
        ({"num_experts": 5}, "num_experts 5 and num_local_experts 8, which are one thing"),
    ],
)
def test_a_config_that_the_tensors_contradict(
    changed: dict[str, int], said: str, copy: Path
) -> None:
    from conftest import inside

    assert moetool.inspect(str(copy))["contradictions"] == []
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changed))
    found = moetool.inspect(str(copy))["contradictions"]
    assert any(said in sentence for sentence in found), found
    shown = inside("inspect", copy)
    assert shown.returncode == 0 and f"contradiction: {found[0]}" in shown.stdout
