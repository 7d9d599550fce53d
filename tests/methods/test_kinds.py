"""Experts that no stock class holds, written: their bytes and names, what reads them, and what is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from methods.upcycled import apart, own_logits
from safetensors.torch import load_file, save_file

import moetool
from moetool.errors import MoetoolError
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.surgery import groups, spellings
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.layout import Layout

Models = Callable[..., Path]
# family -> its block, its linears, and the prefix of its text model
BLOCKS = {
    "llama": ("model.layers.{}.mlp", ("gate_proj", "up_proj", "down_proj")),
    "gemma": ("model.layers.{}.mlp", ("gate_proj", "up_proj", "down_proj")),
    "phi3": ("model.layers.{}.mlp", ("gate_up_proj", "down_proj")),
    "llava": ("language_model.model.layers.{}.mlp", ("gate_proj", "up_proj", "down_proj")),
    "gpt2": ("transformer.h.{}.mlp", ("c_fc", "c_proj")),
    "gpt_neox": ("gpt_neox.layers.{}.mlp", ("dense_h_to_4h", "dense_4h_to_h")),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def made(source: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    moetool.upcycle(str(source), str(out), **options)
    return tensors(out)


def test_all_kinds_are_found() -> None:
    assert set(ExpertKind.known()) == {
        "adapter",
        "carved",
        "film",
        "full",
        "gate",
        "heads",
        "important",
        "kbit",
        "lora",
        "null",
        "parts",
        "sparse",
        "ternary",
    }


@pytest.mark.parametrize("family", BLOCKS)
def test_low_rank_experts_of_every_shape_of_ffn(
    family: str, models: Models, tmp_path: Path
) -> None:
    source, out = models(family), tmp_path / "out"
    new = made(source, out, experts=3, form="lora", rank=4, layers="0", seed=5)
    old, (block, linears) = tensors(source), BLOCKS[family]
    for name, tensor in old.items():
        assert torch.equal(new.pop(name), tensor)
    block = block.format(0)
    router = new.pop(f"{block}.router.weight")
    assert router.shape == (3, 64) and 0.01 < router.std() < 0.03
    seen = Checkpoint.open(out)
    for expert in range(3):
        for linear in linears:
            stem = f"{block}.experts.{expert}.{linear}"
            a, b = new.pop(f"{stem}.lora_A"), new.pop(f"{stem}.lora_B")
            base = old[f"{block}.{linear}.weight"]
            turned = family == "gpt2"
            sides = base.shape[::-1] if turned else base.shape
            assert (b.shape, a.shape) == ((sides[0], 4), (4, sides[1]))
            assert not b.any() and 0.8 < a.std() * (3 * sides[1]) ** 0.5 < 1.2
            assert torch.equal(seen.matrix(f"{stem}.weight"), base)
    assert not new
    config = json.loads((out / "config.json").read_text())
    given = json.loads((source / "config.json").read_text())
    assert groups.base_of(config) == spellings.completed(given)
    (group,) = groups.read(config)
    assert (group.form, group.layers, group.params) == ("lora", (0,), {"rank": 4, "alpha": 8.0})
    assert moetool.verify(str(out), against=[str(source)], load=False)["forms"]["lora"]


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("falcon_mamba", "linears the layout names"),
        ("dinov2", "stack of layers"),
        ("distilbert", "stack of"),
    ],
)
def test_families_in_which_nothing_could_run_experts(family: str, said: str) -> None:
    with pytest.raises(MoetoolError) as raised:
        FfnBlock.of(Layout.load(family))
    assert said in str(raised.value.where)


def test_decoded_is_the_ffn_and_the_change(models: Models, tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        out = tmp_path / family
        made(models(family), out, experts=2, top_k=1, form="lora", rank=3, alpha=12, layers="1")
        (file,) = out.glob("*.safetensors")
        held = load_file(file)
        for name in [n for n in held if n.endswith("lora_B")]:
            held[name] = torch.randn(held[name].shape)
        save_file(held, file, {"format": "pt"})
        seen = Checkpoint.open(out)
        lying = {n: t for n, t in seen.tensors.items() if t.parts}
        assert len(lying) == 2 * len(BLOCKS[family][1])
        for name in lying:
            stem = name.removesuffix(".weight")
            base = held[stem.replace("experts.0.", "").replace("experts.1.", "") + ".weight"]
            change = 4.0 * held[f"{stem}.lora_B"] @ held[f"{stem}.lora_A"]
            wanted = base + (change.T if family == "gpt2" else change)
            assert torch.allclose(seen.matrix(name), wanted, atol=1e-5)


def test_a_router_with_a_bias(models: Models, tmp_path: Path) -> None:
    """As LLaVA-MoLE's official one has: it decides who runs."""
    source, out = models("llama"), tmp_path / "out"
    said = {"experts": 3, "top_k": 1, "law": "hard", "rank": 4, "router_bias": True}
    report = moetool.upcycle(str(source), str(out), form="lora", **said)
    assert report["certificate"]["level"] == "exact"
    (file,) = out.glob("*.safetensors")
    held = load_file(file)
    biases = sorted(name for name in held if name.endswith("mlp.router.bias"))
    assert len(biases) == 4 and not any(held[name].any() for name in biases)
    for name in held:
        if name.endswith("lora_B"):
            expert = int(name.partition(".experts.")[2][0])
            held[name] = torch.full_like(held[name], 0.01 * expert)  # the first changes nothing
    first = {name: torch.tensor([1e4, 0.0, 0.0]) for name in biases}
    save_file(held | first, file, {"format": "pt"})
    assert apart(own_logits(out), tiny.logits(source)) < 1e-5
    save_file(held | {n: b.flip(0) for n, b in first.items()}, file, {"format": "pt"})
    assert apart(own_logits(out), tiny.logits(source)) > 1e-3
    with pytest.raises(moetool.MoetoolError, match="a router with a bias"):
        moetool.materialize(str(out), str(tmp_path / "native"))
    with pytest.raises(moetool.UsageError, match="router-bias"):
        moetool.upcycle(str(source), str(tmp_path / "other"), router_bias=True)


def test_null_experts_are_a_router(models: Models, tmp_path: Path) -> None:
    source, out = models("llama"), tmp_path / "out"
    new = made(source, out, experts=2, form="null", layers="0,2", router="zero")
    more = {n: t for n, t in new.items() if n not in tensors(source)}
    assert set(more) == {f"model.layers.{i}.mlp.router.weight" for i in (0, 2)}
    assert not any(t.any() for t in more.values())
    moetool.verify(str(out), against=[str(source)], load=False)


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_ternary_experts_are_the_ffn_rounded(
    family: str, group: int, models: Models, tmp_path: Path
) -> None:
    from transformers.integrations.bitnet import WeightQuant

    source, out = models(family), tmp_path / "out"
    new = made(
        source, out, experts=2, top_k=1, form="ternary", layers="1", scale_group=group, exact=True
    )
    old, (block, linears) = tensors(source), BLOCKS[family]
    block, seen = block.format(1), Checkpoint.open(out)
    for linear in linears:
        lying = old[f"{block}.{linear}.weight"]
        weight = lying.T if family == "gpt2" else lying
        rows, width = weight.shape
        wanted = weight.reshape(-1, group) if group else weight.reshape(1, -1)
        wanted = torch.stack([WeightQuant.apply(row) for row in wanted]).reshape(weight.shape)
        for expert in range(2):
            stem = f"{block}.experts.{expert}.{linear}"
            packed, scale = new[f"{stem}.weight_packed"], new[f"{stem}.weight_scale"]
            assert (packed.dtype, packed.shape) == (torch.uint8, (rows, width // 4))
            assert scale.shape == ((rows, width // 32) if group else (1,))
            assert torch.equal(scale, scale.half().float())
            codes = torch.stack([packed >> 2 * i & 3 for i in range(4)], -1).reshape(rows, width)
            codes = codes.float() - 1
            assert torch.equal(codes, wanted.sign())
            made_of = seen.matrix(f"{stem}.weight")
            made_of = made_of.T if family == "gpt2" else made_of
            assert torch.allclose(made_of, wanted, rtol=1e-3, atol=0)
            if family == "gpt2":
                assert torch.equal(new[f"{stem}.bias"], old[f"{block}.{linear}.bias"])
    assert not new[f"{block}.experts.1.output_scale"].any()
    moetool.verify(str(out), against=[str(source)], load=False)


def test_what_ternary_experts_weigh_and_promise(models: Models, tmp_path: Path) -> None:
    source = models("llama", dtype="bfloat16")
    for exact, level in ((True, "exact"), (False, "none")):
        out = tmp_path / level
        report = moetool.upcycle(str(source), str(out), experts=8, form="ternary", exact=exact)
        assert report["top_k"] == 1
        assert report["certificate"]["level"] == level
        more = [t for n, t in tensors(out).items() if ".experts." in n]
        assert sum(t.nbytes for t in more) <= 4 * 8 * 3 * 64 * 128 * 2 / 7.9
        assert report["parameters"] - report["active_parameters"] == 4 * 7 * (3 * 64 * 128 + exact)
        config = json.loads((out / "config.json").read_text())
        (group,) = groups.read(config)
        assert (group.base, group.route.law, group.route.top_k) == ("beside", "softmax", 1)


def test_whole_copies_where_no_class_has_them(models: Models, tmp_path: Path) -> None:
    source, other, out = models("gpt2"), models("gpt2", seed=1), tmp_path / "out"
    args = {"experts": 2, "target": "moetool", "layers": "1"}
    moetool.upcycle(str(source), str(out), **args)
    new, old = tensors(out), tensors(source)
    block = "transformer.h.1.mlp"
    assert not [n for n in new if n.startswith(f"{block}.c_")]
    for name in [n for n in old if n.startswith(block)]:
        for expert in range(2):
            copied = new[name.replace(block, f"{block}.experts.{expert}")]
            assert torch.equal(copied, old[name])
    assert moetool.verify(str(out), against=[str(source)], load=False)["verified"]
    both = tmp_path / "both"
    report = moetool.upcycle(
        str(source), str(both), experts_from=[str(other)], expert_map="0,1", **args
    )
    assert report["certificate"]["level"] == "none"
    name = f"{block}.experts.1.c_fc.weight"
    assert torch.equal(tensors(both)[name], tensors(other)[f"{block}.c_fc.weight"])
    with pytest.raises(MoetoolError, match="--from does nothing"):
        moetool.upcycle(str(source), str(tmp_path / "no"), experts_from=[str(other)], form="null")


LORA = {"experts": 2, "form": "lora", "rank": 4}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 65}, "--rank at most 64"),
        ({"law": "hard"}, "--top-k 1"),
        ({"split": 2}, "--split does nothing with --form lora"),
        ({"shared": True}, "--shared"),
        ({"diversify": "permute"}, "--diversify"),
        ({"target": "mixtral"}, "--target moetool"),
        ({"layers": "7"}, "layers 0 to 3"),
        ({"layers": "none"}, "without a layer"),
        ({"alpha": 0.0}, "--alpha 0"),
        ({"form": "auto", "rank": 16, "law": "hard"}, "--form"),
        ({"form": "full"}, "--form lora --rank 4"),
        ({"form": "lorra"}, "lora"),
        ({"form": "ternary"}, "--form lora --rank 4"),
        ({"rank": 16, "form": "ternary", "scale_group": 48}, "divisible by 48"),
    ],
)
def test_what_does_not_go_together(
    options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(MoetoolError) as raised:
        moetool.upcycle(str(models("llama")), str(out), **{**LORA, **options})
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"params": {"rank": 4}}, "alpha"),
        ({"params": {"rank": 5, "alpha": 8.0}}, "does not fit"),
        ({"params": {"rank": 4, "alpha": 8.0, "scal": 1}}, "scal"),
        ({"params": {"rank": "4", "alpha": 8.0}}, "int"),
        ({"params": {"rank": 0, "alpha": 8.0}}, "`rank`"),
        ({"form": "lorra"}, "lora"),
        ({"experts": 3}, "lacks a part"),
        ({"experts": 1, "route": {"top_k": 1}}, "wrong shape"),
        ({"layers": [9]}, "layers 0 to 3"),
    ],
)
def test_a_config_that_is_not_the_weights(
    change: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    made(models("llama"), tmp_path / "out", **LORA, layers="0", top_k=1)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["moetool"]["groups"][0] |= change
    path.write_text(json.dumps(config))
    (tmp_path / "out" / "moetool.json").unlink()
    with pytest.raises(MoetoolError) as raised:
        moetool.quantize(str(tmp_path / "out"), str(tmp_path / "no"), format="int8")
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"


@pytest.mark.parametrize("verb", ["prune", "merge", "quantize", "convert_layout", "upcycle"])
def test_other_verbs_refuse_it(verb: str, models: Models, tmp_path: Path) -> None:
    made(models("llama"), tmp_path / "out", **LORA, layers="0", top_k=1)
    with pytest.raises(MoetoolError, match="groups of experts"):
        getattr(moetool, verb)(str(tmp_path / "out"), str(tmp_path / "no"))


@pytest.mark.parametrize("options", [{"form": "lora"}, {"form": "lora", "site": "linear"}])
def test_an_ffn_that_is_gone_is_said(
    options: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    """What experts stand in the place of cannot be changed; other layers can."""
    source, out = tmp_path / "source", tmp_path / "out"
    made(models("llama"), source, target="moetool", experts=2, layers="1")
    with pytest.raises(MoetoolError) as raised:
        moetool.upcycle(str(source), str(out), experts=2, layers="1", **options)
    assert "'experts' stand in the place of this matrix" in str(raised.value)
    assert raised.value.where["tensor"].startswith("model.layers.1.mlp.")
    assert "--layers" in raised.value.hint
    made(source, out, experts=2, layers="0", **options)
