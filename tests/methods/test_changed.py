"""Experts that hold what fine-tunes changed, at a few places or in a few bits: their bytes, what
they lose, how they run and are written again, and what is refused.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.grown import IDS, apart
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moetool
from moetool.errors import MoetoolError
from moetool.kernels import packing
from moetool.modeling.experts.sparse import SparseLinear
from moetool.surgery.checkpoint import Checkpoint

Models = Callable[..., Path]
LINEARS = {"llama": ("gate_proj", "up_proj", "down_proj"), "gpt2": ("c_fc", "c_proj")}
BLOCKS = {"llama": "model.layers.{}.mlp", "gpt2": "transformer.h.{}.mlp"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def tuned(source: Path, out: Path, seed: int = 0) -> Path:
    """A fine-tune: a little of everything in the FFNs has changed."""
    shutil.copytree(source, out)
    held, draw = tensors(out), torch.Generator().manual_seed(seed)
    for name in [n for n in held if ".mlp." in n and n.endswith("weight")]:
        more = torch.randn(held[name].shape, generator=draw) * 0.02
        held[name] = (held[name].float() + more).to(held[name].dtype)
    save_file(held, out / "model.safetensors", {"format": "pt"})
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=IDS).logits.float()
    return made


@pytest.mark.parametrize("family", BLOCKS)
def test_the_largest_changes_are_kept(family: str, models: Models, tmp_path: Path) -> None:
    source = models(family)
    other, out = tuned(source, tmp_path / "tuned"), tmp_path / "out"
    options: dict[str, Any] = {"form": "sparse", "delta_keep": 0.05, "experts": 2, "layers": "1"}
    report = moetool.upcycle(
        str(source), str(out), experts_from=[str(other)], expert_map="0,1", **options
    )
    assert report["certificate"]["level"] == "none"
    assert "5% of the numbers" in str(report["warnings"])
    old, new, held, seen = tensors(source), tensors(other), tensors(out), Checkpoint.open(out)
    block = BLOCKS[family].format(1)
    for linear in LINEARS[family]:
        before, after = (t[f"{block}.{linear}.weight"] for t in (old, new))
        change = (after - before).flatten()
        count = round(0.05 * change.numel())
        kept = torch.zeros_like(change)
        best = change.abs().topk(count).indices
        kept[best] = change[best]
        stem = f"{block}.experts.1.{linear}"
        decoded = seen.matrix(f"{stem}.weight")
        assert torch.allclose(decoded, before + kept.view(before.shape), atol=1e-7)
        assert held[f"{stem}.delta_columns"].dtype == torch.int16
        assert len(held[f"{stem}.delta_values"]) == count
        assert torch.equal(seen.matrix(f"{block}.experts.0.{linear}.weight"), before)
        size = sum(t.nbytes for n, t in held.items() if n.startswith(stem))
        assert size <= 6 * count + 4 * (max(before.shape) + 1)
    moetool.verify(str(out), against=[str(source), str(other)], load=False)


def test_from_nothing_it_is_exact_and_learns(models: Models, tmp_path: Path) -> None:
    source, out = models("llama"), tmp_path / "out"
    report = moetool.upcycle(
        str(source), str(out), form="sparse", delta_keep=0.001, experts=4, seed=3
    )
    assert report["certificate"]["level"] == "exact"
    moetool.verify(str(out), against=[str(source)])
    model = moetool.load(out)
    assert apart(logits(model), logits(moetool.load(source))) <= 1e-5
    names = [n for n, p in model.named_parameters() if p.requires_grad and ".experts." in n]
    assert names and all(n.endswith("delta_values") for n in names)
    places = {n: p.clone() for n, p in model.named_parameters() if "delta_" in n}
    step = torch.optim.SGD([model.get_parameter(n) for n in names], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    step.step()
    moved = {n for n, p in places.items() if not torch.equal(p, model.get_parameter(n))}
    assert len(moved) > len(names) / 2 and moved <= set(names)


FORMS: dict[str, dict[str, Any]] = {
    "sparse": {"form": "sparse", "delta_keep": 0.05},
    "random": {"form": "sparse", "delta_keep": 0.5, "delta_places": "random"},
    "few": {"form": "sparse", "delta_keep": 0.001},
    "1 bit": {"form": "kbit", "delta_bits": 1},
    "3 bits": {"form": "kbit", "delta_bits": 3, "delta_group": 32},
    "8 bits": {"form": "kbit", "delta_bits": 8, "delta_group": 0},
}


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("family", BLOCKS)
def test_runs_as_decoded_and_is_written_again(
    how: str, family: str, models: Models, tmp_path: Path
) -> None:
    """Each expert's matrices in full, as whole experts: the same logits; the same bytes again."""
    source, out, full = models(family), tmp_path / "out", tmp_path / "full"
    others = [str(tuned(source, tmp_path / f"{seed}", seed)) for seed in (1, 2)]
    given: dict[str, Any] = {"experts_from": others, "experts": 2, "router": "normal:1"}
    moetool.upcycle(str(source), str(out), **given, **FORMS[how])
    moetool.upcycle(str(source), str(full), target="moetool", **given)
    held, seen = tensors(full), Checkpoint.open(out)
    for name in [n for n in held if ".experts." in n and n.endswith(".weight")]:
        held[name] = seen.matrix(name).contiguous()
    held |= {n: t for n, t in tensors(out).items() if n.endswith("router.weight")}
    save_file(held, full / "model.safetensors", {"format": "pt"})
    model = moetool.load(out)
    assert apart(logits(model), logits(moetool.load(full))) <= 1e-5
    assert apart(logits(model), logits(moetool.load(source))) > 1e-4
    assert apart(logits(moetool.load(out, unpack="load")), logits(model)) <= 1e-6
    model.save_pretrained(tmp_path / "again")
    before, after = tensors(out), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) and t.dtype == after[n].dtype for n, t in before.items())
    memory = sum(p.nbytes for p in model.parameters())
    assert memory <= 1.02 * sum(t.nbytes for t in before.values())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_bits_weigh(bits: int, models: Models, tmp_path: Path) -> None:
    """In bf16 the experts take at most (bits + 16 / 64) of 16 bits; wide inputs or narrow ones."""
    source = models("llama", dtype="bfloat16")
    other, out = tuned(source, tmp_path / "tuned"), tmp_path / "out"
    moetool.upcycle(
        str(source),
        str(out),
        experts_from=[str(other)] * 2,
        experts=2,
        form="kbit",
        delta_bits=bits,
        layers="0",
    )
    held = {n: t for n, t in tensors(out).items() if ".experts." in n}
    assert sum(t.nbytes for t in held.values()) <= 2 * 3 * 64 * 128 * (bits + 16 / 64) / 8
    packed = held["model.layers.0.mlp.experts.1.up_proj.delta_packed"]
    assert packing.codes(packed, bits, 64).max() == 2**bits - 1
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and logits(model).isfinite().all()


@pytest.mark.parametrize("rows", [1, 300])
def test_places_are_added_in_two_ways_alike(rows: int) -> None:
    """One by one or as a matrix, to what is given or alone, under autocast too."""
    linear = SparseLinear((96, 64), 0.02).requires_grad_(False)
    linear.reset()
    linear.delta_values.normal_(generator=torch.Generator().manual_seed(0))
    assert linear.spreads(rows) == (rows > 1)
    x, base = torch.randn(rows, 64), torch.randn(rows, 96)
    wanted = x.double() @ linear.dense(torch.zeros(96, 64)).double().T
    for spread in (False, True):
        assert apart(linear.added(x, None, False, spread), wanted) <= 1e-6
        assert apart(linear.added(x, base, False, spread), base + wanted) <= 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            made = linear.added(x, base.bfloat16(), False, spread)
        assert apart(made.float(), base + wanted) <= 2e-2


@pytest.mark.parametrize("how", ["sparse", "1 bit", "lora"])
def test_changed_biases_are_named(how: str, models: Models, tmp_path: Path) -> None:
    """A change of a matrix holds no bias: whose is left out is said, before any work too."""
    source = models("gpt2")
    other, name = tuned(source, tmp_path / "tuned"), "transformer.h.1.mlp.c_fc.bias"
    options: dict[str, Any] = {"experts": 2, **FORMS.get(how, {"form": "lora", "rank": 4})}

    def warned(out: str, **more: Any) -> str:
        given = {"experts_from": [str(source), str(other)], **options, **more}
        return str(moetool.upcycle(str(source), str(tmp_path / out), **given)["warnings"])

    assert "base's biases" not in warned("as it was", dry_run=True)
    held = tensors(other)
    held[name] = held[name] + 1e-3
    save_file(held, other / "model.safetensors", {"format": "pt"})
    for dry in (True, False):
        said = warned("out", dry_run=dry)
        assert f"in 1 of them is left out (2:{name})" in said and "--target moetool" in said
    assert "base's biases" not in warned("other layers", layers="0", dry_run=True)
    options = {"experts": 2, "target": "moetool", "form": "auto"}
    assert "base's biases" not in warned("whole")
    whole = tensors(tmp_path / "whole")["transformer.h.1.mlp.experts.1.c_fc.bias"]
    assert torch.equal(whole, held[name])
    held["transformer.ln_f.weight"] = held["transformer.ln_f.weight"] * 1.5
    save_file(held, other / "model.safetensors", {"format": "pt"})
    said = warned("trunk", dry_run=True)
    assert (
        "beside the matrices of its experts" in said and "most in transformer.ln_f.weight" in said
    )


WITHOUT = """
import sys
sys.modules["moetool"] = None
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    for trusted in (False, True):
        try:
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted)
        except (ValueError, ImportError) as problem:
            print(repr(problem))
"""


def test_without_moetool_it_is_no_model(models: Models, tmp_path: Path) -> None:
    source, made = models("llama"), [tmp_path / "one", tmp_path / "two"]
    other = tuned(source, tmp_path / "tuned")
    for out, how in zip(made, ("sparse", "1 bit"), strict=True):
        moetool.upcycle(str(source), str(out), experts_from=[str(other)], experts=2, **FORMS[how])
    args = [sys.executable, "-c", WITHOUT, *map(str, made)]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) == 4 and all("moetool" in line for line in said)
    assert all("pip install moetool" in line for line in said[1::2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "sparse", "delta_keep": 0.0}, "above 0"),
        ({"form": "sparse", "delta_keep": 1.5}, "at most 1"),
        ({"form": "kbit"}, "--from"),
        ({"form": "kbit", "delta_bits": 9, "experts_from": 1}, "1 to 8"),
        ({"form": "kbit", "delta_group": 48, "experts_from": 1}, "divides 64"),
        ({"form": "sparse", "rank": 4}, "--form"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    source = str(models("llama"))
    if "experts_from" in options:
        options = options | {"experts_from": [source]}
    with pytest.raises(MoetoolError) as raised:
        moetool.upcycle(source, str(tmp_path / "out"), **options)
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keep": 0.07}, "does not fit"),
        ({"keep": 2.0}, "at most 1"),
        ({"keep": 0.05, "kep": 1}, "keep"),
        ({}, "keep"),
    ],
)
def test_a_config_that_is_not_the_weights(
    change: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    moetool.upcycle(str(models("llama")), str(out), experts=2, **FORMS["sparse"])
    config = json.loads((out / "config.json").read_text())
    config["moetool"]["groups"][0]["params"] = change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoetoolError) as raised:
        Checkpoint.open(out)
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"
