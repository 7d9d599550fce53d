"""Ternary experts trained through weights in full: as transformers' own rounding trains, and packed
again without loss; damaged ones are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.grown import IDS, apart
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.integrations.bitnet import ActQuant, WeightQuant

import moetool
from moetool.errors import MoetoolError
from moetool.kernels import ternary
from moetool.modeling.experts.ternary import TernaryLinear

Models = Callable[..., Path]
MOTE: dict[str, Any] = {"form": "ternary", "experts": 2, "top_k": 1, "activations": "int8"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=IDS).logits
    return made


def linears(model: Any) -> dict[str, TernaryLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, TernaryLinear)}


@pytest.mark.parametrize("rounds", [True, False])
def test_as_transformers_trains_them(rounds: bool) -> None:
    from moetool.modeling.block import FfnLinears

    draw = torch.Generator().manual_seed(1)
    weight, x, back = (torch.randn(n, 64, generator=draw) for n in (48, 9, 9))
    back = back[:, :48]
    shapes = FfnLinears((), "down", {"down": (48, 64)}, frozenset())
    part = TernaryLinear({"activations": "int8" if rounds else "float"}, shapes, "down")
    codes = ternary.absmean(weight)
    part.weight_packed.data = ternary_bytes(codes.codes)
    part.weight_scale.data = codes.scale
    part.hold_master(weight)
    assert part.master is not None and torch.equal(part.master, weight)
    theirs, seen = weight.clone().requires_grad_(), x.clone().requires_grad_()
    mine = x.clone().requires_grad_()
    wanted = functional.linear(ActQuant.apply(seen) if rounds else seen, WeightQuant.apply(theirs))
    made = part(mine)
    assert apart(made, wanted) < 2**-10  # scales are rounded to float16
    made.backward(back)
    wanted.backward(back)
    assert theirs.grad is not None and part.master.grad is not None
    assert apart(part.master.grad, theirs.grad) < 1e-6
    assert mine.grad is not None and seen.grad is not None and apart(mine.grad, seen.grad) < 2**-10


def ternary_bytes(codes: torch.Tensor) -> torch.Tensor:
    from moetool.kernels import two_bits

    return two_bits.packed(codes)


@pytest.mark.parametrize("group", [0, 16])
def test_weights_in_full_that_round_to_what_is_packed(group: int) -> None:
    draw = torch.Generator().manual_seed(2)
    codes = torch.randint(-1, 2, (32, 64), generator=draw, dtype=torch.int8)
    codes[3] = 0
    shape = (32, 64 // group) if group else (1,)
    scale = (torch.rand(shape, generator=draw) + 0.01).half().float()
    made = ternary.absmean(ternary.master(codes, scale, group), group)
    assert torch.equal(made.codes, codes)
    filled = codes.view(32, -1, group).bool().any(-1) if group else torch.tensor([True])
    assert torch.equal(made.scale[filled], scale[filled])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("scale_group", [0, 32])
def test_what_is_written_computes_what_was_trained(
    family: str, scale_group: int, models: Models, tmp_path: Path
) -> None:
    source, out = models(family), tmp_path / "out"
    moetool.upcycle(str(source), str(out), **MOTE, scale_group=scale_group)
    plain, model = moetool.load(out), moetool.load(out, train="ste")
    assert apart(logits(model), logits(plain)) <= 1e-5
    block = next(iter(linears(model))).rpartition(".experts")[0]
    for name, part in linears(model).items():
        if name.startswith(block):  # it was rounded from the FFN: that is what is trained
            own = model.get_parameter(f"{block}.{name.rpartition('.')[2]}.weight")
            assert part.master is not None
            assert torch.equal(part.master, own.T if family == "gpt2" else own)
    masters = [n for n, p in model.named_parameters() if n.endswith("master") and p.requires_grad]
    assert len(masters) == len(linears(model))
    step = torch.optim.AdamW([model.get_parameter(n) for n in masters], lr=0.02)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        step.step()
        step.zero_grad()
    trained = logits(model)
    assert apart(trained, logits(plain)) > 1e-3
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (out, tmp_path / "again"))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    packed = [n for n in before if n.endswith("weight_packed")]
    assert sum(not torch.equal(before[n], after[n]) for n in packed) > len(packed) / 4
    assert apart(logits(moetool.load(tmp_path / "again")), trained) <= 1e-5
    again = moetool.load(tmp_path / "again", train="ste")
    assert apart(logits(again), trained) <= 1e-5
    again.save_pretrained(tmp_path / "third")
    third = load_file(tmp_path / "third" / "model.safetensors")
    assert all(torch.equal(third[n], after[n]) for n in after)
    missing = model.load_state_dict(before, strict=False).missing_keys
    assert not any(n.endswith("master") for n in missing)
    assert apart(logits(model), logits(plain)) <= 1e-5


def test_only_ternary_experts_have_it(models: Models, tmp_path: Path) -> None:
    moetool.upcycle(str(models("llama")), str(tmp_path / "lora"), experts=2, form="lora")
    moetool.upcycle(str(models("llama")), str(tmp_path / "mote"), **MOTE)
    for folder, how in (
        (tmp_path / "lora", {"train": "ste"}),
        (models("llama"), {"train": "ste"}),
        (tmp_path / "mote", {"train": "stee"}),
        (tmp_path / "mote", {"train": "ste", "unpack": "load"}),
    ):
        with pytest.raises(MoetoolError, match="train="):
            moetool.load(folder, **how)


def damaged(tensor: torch.Tensor, how: str) -> torch.Tensor:
    if how in ("nan", "inf"):
        return torch.full_like(tensor, float(how))
    if how == "code":
        return tensor.index_fill(0, torch.tensor([3]), 0b00110000)
    return tensor.to({"bf16": torch.bfloat16, "int8": torch.int8}[how])


@pytest.mark.parametrize(
    ("part", "how", "said"),
    [
        ("weight_scale", "nan", "finite"),
        ("weight_scale", "inf", "finite"),
        ("weight_scale", "bf16", "F32 [1]"),
        ("weight_packed", "code", "code 3"),
        ("weight_packed", "int8", "U8"),
    ],
)
def test_damaged_ones_are_refused_by_name(
    part: str, how: str, said: str, models: Models, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    moetool.upcycle(str(models("llama")), str(out), **MOTE)
    (file,) = out.glob("*.safetensors")
    with file.open("rb") as opened:
        head = opened.read(int.from_bytes(opened.read(8), "little"))
    digest = head.decode().partition('"moetool_plan":"')[2].partition('"')[0]
    held, name = load_file(file), f"model.layers.2.mlp.experts.1.up_proj.{part}"
    held[name] = damaged(held[name], how)
    save_file(held, file, {"format": "pt", "moetool_plan": digest})
    for use in (moetool.load, moetool.verify):
        with pytest.raises(MoetoolError) as raised:
            use(str(out))
        assert raised.value.where["tensor"] == name
        assert said in f"{raised.value} {raised.value.where}"
    if how in ("nan", "inf", "code"):  # dtypes are what a class makes of them
        with pytest.raises(MoetoolError, match="damaged") as raised:
            AutoModelForCausalLM.from_pretrained(out)
        assert raised.value.where["tensor"] == name and said in f"{raised.value.where}"


@pytest.mark.parametrize(("part", "number"), [("delta_columns", -1), ("delta_rows", 1)])
def test_damaged_places_are_refused(part: str, number: int, models: Models, tmp_path: Path) -> None:
    """By a plain Auto class too: such a model would read beside its matrix."""
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), form="sparse", experts=2)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    held, name = load_file(file), f"model.layers.2.mlp.experts.1.up_proj.{part}"
    held[name][0] = number
    save_file(held, file, {"format": "pt"})
    for use in (moetool.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(MoetoolError) as raised:
            use(str(tmp_path / "out"))
        assert raised.value.where["tensor"] == name
