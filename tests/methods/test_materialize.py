"""What only moetool runs, as a class that every client loads: the same logits, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
from methods.upcycled import IDS, apart, own_logits, trained
from safetensors.torch import load_file, save_file

import moetool
from moetool.errors import MoetoolError
from moetool.surgery.checkpoint import Checkpoint

Models = Callable[..., Path]


@pytest.mark.parametrize(
    ("family", "target", "options"),
    [
        ("llama", "mixtral", {"form": "lora", "rank": 4}),
        ("llama", "qwen2_moe", {"form": "lora", "rank": 4, "law": "hard", "top_k": 1}),
        ("llama", "mixtral", {"form": "lora", "rank": 4, "law": "soft"}),
        ("phi3", "mixtral", {"form": "lora", "rank": 4}),
        ("phi3", "mixtral", {"form": "sparse", "delta_keep": 0.1}),
        ("qwen2", "qwen2_moe", {"form": "lora", "rank": 4, "law": "softmax", "layers": "1,3"}),
        ("qwen3", "qwen3_moe", {"form": "lora", "rank": 4}),
        ("llama", "glm4_moe", {"form": "lora", "rank": 4, "law": "hard", "top_k": 1}),
        ("qwen2", "qwen2_moe", {"form": "ternary", "top_k": 1}),
        ("llama", "qwen2_moe", {"form": "ternary", "exact": True, "scale_group": 32}),
        ("llama", "mixtral", {"target": "moetool", "activation": "relu"}),
        ("llama", "qwen2_moe", {"target": "moetool", "shared": True, "scale": "0.75"}),
        ("llama", "glm4_moe", {"form": "lora", "rank": 4, "law": "sigmoid"}),
        ("qwen3", "dots1", {"form": "lora", "law": "sigmoid", "renormalise": True}),
        ("llama", "mixtral", {"form": "lora", "law": "sigmoid", "renormalise": True, "top_k": 1}),
        ("llama", "qwen2_moe", {"form": "ternary", "key": "always"}),
        ("llama", "mixtral", {"form": "lora", "key": "always"}),
        ("llama", "mixtral", {"form": "lora", "law": "soft", "temperature": 0.7}),
        ("llama", "mixtral", {"form": "lora", "law": "expert_choice", "capacity": 3}),
        ("qwen2", "qwen2_moe", {"form": "lora", "law": "top_p", "top_p": 1, "top_k": 2}),
        ("qwen2", "qwen2_moe", {"form": "lora", "law": "gumbel", "final_weight": "share"}),
        ("llama", "mixtral", {"target": "moetool"}),
    ],
)
def test_the_native_model_computes_the_same(
    family: str, target: str, options: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    own = trained(models(family), tmp_path / "own", experts=3, **options)
    native = tmp_path / "native"
    report = moetool.materialize(str(own), str(native), target=target)
    ranked = options.get("law") == "sigmoid" and "top_k" not in options  # routers are N(0, 1)
    assert report["certificate"]["level"] == ("exact_if" if ranked else "exact")
    assert ("scores are below 16" in report["certificate"]["why"]) == ranked
    wanted = own_logits(own)
    born = apart(tiny.logits(models(family)), wanted)
    assert apart(tiny.logits(native), wanted) < 1e-5
    assert born > 1e-3 or (target == "mixtral" and "form" not in options)
    moetool.verify(str(native), against=[str(own)], load=False)


def test_a_router_that_is_made_of_domains(models: Models, tmp_path: Path) -> None:
    """Its rows, as an ordinary router has them."""
    file = tmp_path / "domains.safetensors"
    save_file({"of": torch.randn(3, 8, generator=torch.Generator().manual_seed(0))}, file)
    said = {"form": "lora", "rank": 4, "experts": 3, "key": "domain", "domains": str(file)}
    own, native = trained(models("llama"), tmp_path / "own", **said), tmp_path / "native"
    (held,) = own.glob("*.safetensors")
    made = {n: t * 8 if ".router." in n else t for n, t in load_file(held).items()}
    save_file(made, held, {"format": "pt"})
    report = moetool.materialize(str(own), str(native), target="mixtral")
    assert report["certificate"]["level"] == "exact"
    assert apart(tiny.logits(native), own_logits(own)) < 1e-5
    moetool.verify(str(native), against=[str(own)], load=False)


def test_scores_whose_sigmoids_are_all_one(models: Models, tmp_path: Path) -> None:
    """The best of them is still the best: the router is made smaller by a power of two."""
    said = {"form": "lora", "rank": 4, "law": "hard", "top_k": 1, "experts": 3}
    own, native = trained(models("llama"), tmp_path / "own", **said), tmp_path / "native"
    (file,) = own.glob("*.safetensors")
    held = {n: t * 8 if n.endswith("router.weight") else t for n, t in load_file(file).items()}
    save_file(held, file, {"format": "pt"})
    moetool.materialize(str(own), str(native), target="glm4_moe")
    assert apart(tiny.logits(native), own_logits(own)) < 1e-5
    small = Checkpoint.open(str(native)).matrix("model.layers.1.mlp.gate.weight")
    shares = (held["model.layers.1.mlp.router.weight"] / small).unique()
    assert shares.numel() == 1 and shares.log2() == shares.log2().round() and shares >= 16
    moetool.verify(str(native), against=[str(own)], load=False)


@pytest.mark.parametrize(
    ("family", "target", "options", "said"),
    [
        ("llama", "mixtral", {"form": "lora", "law": "softmax"}, "share of the softmax"),
        ("llama", "glm4_moe", {"form": "lora"}, "softmax that sums to one"),
        ("llama", "mixtral", {"form": "ternary"}, "no shared expert"),
        ("gpt2", "auto", {"form": "lora"}, "gpt2"),
        ("llama", "auto", {"form": "null"}, "add nothing"),
        ("llama", "auto", {"form": "adapter", "adapter_dim": 8}, "goes into an FFN or comes out"),
        ("llama", "auto", {"form": "lora", "site": "linear"}, "a router for each linear"),
        ("llama", "auto", {"form": "film"}, "film experts"),
        ("llama", "auto", {"form": "lora", "law": "top_p"}, "the law top_p (threshold 0.7)"),
        (
            "llama",
            "auto",
            {"form": "lora", "law": "expert_choice", "capacity": 1},
            "the law expert_choice",
        ),
        ("llama", "auto", {"form": "lora", "key": "sequence"}, "a route that looks at sequence"),
        ("llama", "mixtral", {"form": "lora", "law": "sigmoid"}, "by its own sigmoid"),
        (
            "qwen2",
            "auto",
            {"target": "moetool", "activation": "relu", "layers": "1"},
            "compute with relu too",
        ),
        ("llama", "gpt_oss", {"form": "lora"}, "gpt_oss"),
    ],
)
def test_what_no_class_computes(
    family: str,
    target: str,
    options: dict[str, Any],
    said: str,
    models: Models,
    tmp_path: Path,
) -> None:
    own = tmp_path / "own"
    moetool.upcycle(str(models(family)), str(own), experts=2, **options)
    with pytest.raises(MoetoolError) as raised:
        moetool.materialize(str(own), str(tmp_path / "native"), target=target)
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(
    ("dtype", "asked"),
    [("float32", "int4/channel"), ("bfloat16", "int4/32"), ("bfloat16", "int2/64")],
)
def test_ternary_experts_in_few_bits_are_not_rounded(
    dtype: str, asked: str, models: Models, tmp_path: Path
) -> None:
    """Scales are the experts' own; transformers computes with them in their dtype, float32."""
    own = trained(
        models("qwen2", dtype=dtype), tmp_path / "own", experts=3, form="ternary", top_k=1
    )
    native, small = tmp_path / "native", tmp_path / "small"
    report = moetool.materialize(str(own), str(native), target="qwen2_moe")
    assert report["certificate"]["level"] == "exact" and not report["warnings"]
    report = moetool.quantize(str(native), str(small), plan=f"experts={asked}", loader_check=False)
    assert report["proof"]["roles"]["experts"]["worst"]["relative_error"] == 0.0
    one, other, before = map(Checkpoint.open, map(str, (native, small, own)))
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    wanted = before.matrix(name).float()
    assert torch.equal(one.matrix(name).float(), wanted) and wanted.unique().numel() == 3
    assert torch.equal(other.matrix(name).float(), wanted)
    assert apart(tiny.logits(small), own_logits(own)) < 1e-5


def test_ternary_experts_in_a_gguf_file(models: Models, tmp_path: Path) -> None:
    """The codes that the `gguf` library decodes are the experts'."""
    wide = models("qwen2", dtype="bfloat16", hidden_size=256, intermediate_size=512)
    own = trained(wide, tmp_path / "own", experts=2, form="ternary", top_k=1)
    moetool.materialize(str(own), str(tmp_path / "native"), target="qwen2_moe")
    small = tmp_path / "small"
    plan = "experts=gguf:tq2_0"
    moetool.quantize(str(tmp_path / "native"), str(small), plan=plan, loader_check=False)
    held = {t.name: t for t in gguf.GGUFReader(small / "model.gguf").tensors}
    before = Checkpoint.open(str(own))
    for there, here in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        stack = held[f"blk.1.ffn_{there}_exps.weight"]
        assert stack.tensor_type == gguf.GGMLQuantizationType.TQ2_0
        made = torch.from_numpy(gguf.dequantize(stack.data, stack.tensor_type).copy())
        for expert in range(2):
            wanted = before.matrix(f"model.layers.1.mlp.experts.{expert}.{here}.weight")
            assert torch.equal(made[expert], wanted.float()) and wanted.unique().numel() == 3


def test_activations_in_int8_are_said(models: Models, tmp_path: Path) -> None:
    own = trained(
        models("qwen2"),
        tmp_path / "own",
        experts=2,
        form="ternary",
        top_k=1,
        activations="int8",
    )
    report = moetool.materialize(str(own), str(tmp_path / "native"))
    assert report["certificate"]["level"] == "exact_if"
    assert "activations of experts, which moetool rounds to int8" in report["certificate"]["why"]
    assert 1e-5 < apart(tiny.logits(tmp_path / "native"), own_logits(own)) < 2e-2


def test_a_native_model_is_none_of_it(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MoetoolError, match="no groups of experts"):
        moetool.materialize(str(llama), str(tmp_path / "native"))


def test_groups_that_add_nothing_are_left_out(models: Models, tmp_path: Path) -> None:
    source, own, native = models("llama"), tmp_path / "own", tmp_path / "native"
    two, plain = tmp_path / "two", tmp_path / "plain"
    trained(source, own, experts=2, form="lora", rank=4)
    moetool.upcycle(str(own), str(two), experts=2, form="null", layers="1,2")
    report = moetool.materialize(str(two), str(native), target="mixtral")
    assert report["certificate"]["level"] == "exact"
    assert apart(tiny.logits(native), own_logits(two)) < 1e-5
    assert "model.layers.2.mlp.experts_2_router.weight" in report["dropped_tensors"]
    moetool.verify(str(native), against=[str(two)], load=False)
    with pytest.raises(MoetoolError, match=r"without group experts \(lora, ffn\) every token"):
        moetool.materialize(str(two), str(plain), target="base")
    moetool.upcycle(str(source), str(tmp_path / "null"), experts=2, form="null")
    moetool.materialize(str(tmp_path / "null"), str(plain), target="base")
    assert same_tensors(plain, source)


def same_tensors(one: Path, other: Path) -> bool:
    """By name and value, and the config but for how it was spelled."""
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    kinds = {json.loads((f / "config.json").read_text())["model_type"] for f in (one, other)}
    return same and len(kinds) == 1


def test_text_goes_on_without_the_experts_of_images(models: Models, tmp_path: Path) -> None:
    """Bit for bit, whatever became of them."""
    source, own, plain = models("llama"), tmp_path / "own", tmp_path / "plain"
    said = {"key": "modality", "modality_ids": "7", "experts": 1, "top_k": 1, "site": "attention"}
    moetool.upcycle(str(source), str(own), **said)
    (file,) = own.glob("*.safetensors")
    held = load_file(file)
    changed = {n: t * 1.5 if ".experts." in n else t for n, t in held.items()}
    save_file(changed, file, {"format": "pt"})
    report = moetool.materialize(str(own), str(plain), target="base")
    assert report["certificate"]["level"] == "exact_if" and "text" in report["certificate"]["why"]
    assert same_tensors(plain, source) and (IDS != 7).all()
    assert torch.equal(tiny.logits(plain), own_logits(own))
    moetool.verify(str(plain), against=[str(own)])


def test_which_of_several_groups_no_class_has(models: Models, tmp_path: Path) -> None:
    own, two = tmp_path / "own", tmp_path / "two"
    moetool.upcycle(str(models("llama")), str(own), experts=2, form="lora", rank=4)
    moetool.upcycle(str(own), str(two), experts=2, form="ternary", layers="1", top_k=1)
    with pytest.raises(MoetoolError, match=r"experts \(lora, ffn\), experts_2 \(ternary, ffn\)"):
        moetool.materialize(str(two), str(tmp_path / "native"))
