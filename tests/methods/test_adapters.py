"""Adapters and fine-tunes as low-rank experts: the same bytes, the best of a rank, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moetool
from moetool.errors import MoetoolError
from moetool.kernels import change
from moetool.surgery import groups
from moetool.surgery.checkpoint import Checkpoint

Models = Callable[..., Path]
FFN = ("gate_proj", "up_proj", "down_proj")
SIDES = {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}
SIDES |= {"q_proj": (96, 64), "v_proj": (48, 64)}


def adapter(
    folder: Path, *, seed: int = 0, linears: Sequence[str] = FFN, rank: int = 4, **config: Any
) -> Path:
    """A folder as PEFT 0.21 saves LoRA of the FFNs of a tiny Llama."""
    folder.mkdir()
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "use_dora": False}
    said |= {"target_modules": list(linears), "modules_to_save": None, "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    drawn, held = torch.Generator().manual_seed(seed), {}
    for layer in range(4):
        for linear in linears:
            where = "self_attn" if linear not in FFN else "mlp"
            stem = f"base_model.model.model.layers.{layer}.{where}.{linear}"
            out, into = SIDES.get(linear, (64, 64))
            held[f"{stem}.lora_A.weight"] = torch.randn(rank, into, generator=drawn)
            held[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=drawn)
    save_file(held, folder / "adapter_model.safetensors")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("linears", [FFN, ("up_proj", "down_proj")])
def test_adapters_become_experts(linears: tuple[str, ...], models: Models, tmp_path: Path) -> None:
    given = [adapter(tmp_path / f"a{n}", seed=n, linears=linears) for n in range(3)]
    source, out = models("llama"), tmp_path / "out"
    report = moetool.upcycle(
        str(source), str(out), experts=3, form="lora", from_adapters=list(map(str, given))
    )
    assert report["certificate"]["level"] == "none"
    new, (group,) = tensors(out), groups.read(json.loads((out / "config.json").read_text()))
    assert (group.params["rank"], group.params["alpha"]) == (4, 8.0)
    assert group.params.get("targets", list(FFN)) == [n for n in FFN if n in linears]
    for expert, folder in enumerate(given):
        for name, tensor in tensors(folder).items():
            inner = name.removeprefix("base_model.model.").removesuffix(".weight")
            where = inner.replace(".mlp.", f".mlp.experts.{expert}.")
            assert torch.equal(new.pop(where), tensor)
    assert len(new) == len(tensors(source)) + 4
    name = "model.layers.2.mlp.experts.1.up_proj"
    base = tensors(source)["model.layers.2.mlp.up_proj.weight"]
    part = tensors(given[1])
    stem = "base_model.model.model.layers.2.mlp.up_proj"
    wanted = base + 2 * part[f"{stem}.lora_B.weight"] @ part[f"{stem}.lora_A.weight"]
    made = Checkpoint.open(out).matrix(f"{name}.weight")
    assert torch.allclose(made, wanted, atol=1e-4)
    for folder in given:  # they need not be there
        (folder / "adapter_model.safetensors").unlink()
    checked = moetool.verify(str(out), against=[str(source)], load=False)
    assert checked["bytes"]["sealed_tensors"] == 4 * 3 * len(linears) * 2


def mixlora(folder: Path, attention: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """A folder as TUDB-Labs' MixLoRA saves it: experts in the FFN, plain LoRA on attention."""
    folder.mkdir()
    held: dict[str, torch.Tensor] = {}
    said = {"peft_type": "MIXLORA", "r": 4, "lora_alpha": 8, "num_experts": 2, "top_k": 2}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    for layer in range(4):
        for linear in attention:
            stem = f"mixlora.layers.{layer}.self_attn.{linear}"
            held[f"{stem}.lora_A.weight"] = torch.randn(4, SIDES[linear][1])
            held[f"{stem}.lora_B.weight"] = torch.randn(SIDES[linear][0], 4)
        head = f"mixlora.layers.{layer}.mlp"
        held[f"{head}.moe_gate.weight"] = torch.randn(2, 64)
        for expert in range(2):
            for linear in FFN:
                stem = f"{head}.{linear}.experts.{expert}"
                out_, into = SIDES[linear]
                held[f"{stem}.lora_A.weight"] = torch.randn(4, into)
                held[f"{stem}.lora_B.weight"] = torch.randn(out_, 4)
    torch.save(held, folder / "adapter_model.bin")
    return held


@pytest.mark.parametrize("attention", [(), ("q_proj", "v_proj")])
def test_a_folder_of_mixlora_gives_all_experts_and_the_router(
    attention: tuple[str, ...], models: Models, tmp_path: Path
) -> None:
    """What it changes of the attention becomes the base's, where that is asked for."""
    out, source = tmp_path / "out", models("llama")
    held = mixlora(tmp_path / "mix", attention)
    options = {"experts": 2, "form": "lora", "from_adapters": [str(tmp_path / "mix")]}
    if attention:
        with pytest.raises(MoetoolError, match="more than the FFNs") as raised:
            moetool.upcycle(str(source), str(out), **options)
        assert "--merge-attention" in raised.value.hint
        options["merge_attention"] = True
    moetool.upcycle(str(source), str(out), **options)
    new, old = tensors(out), tensors(source)
    for name in (n for n in old if "self_attn" in n):
        wanted = old[name]
        if name.split(".")[-2] in attention:
            stem = name.replace("model.", "mixlora.", 1).removesuffix(".weight")
            wanted = wanted + 2 * held[f"{stem}.lora_B.weight"] @ held[f"{stem}.lora_A.weight"]
        assert torch.allclose(new[name], wanted, rtol=1e-6, atol=1e-5)
    for layer in range(4):
        there, head = f"model.layers.{layer}.mlp", f"mixlora.layers.{layer}.mlp"
        assert torch.equal(new[f"{there}.router.weight"], held[f"{head}.moe_gate.weight"])
        for expert in range(2):
            made = new[f"{there}.experts.{expert}.down_proj.lora_B"]
            assert torch.equal(made, held[f"{head}.down_proj.experts.{expert}.lora_B.weight"])


class Harmful:
    """A pickle that would make a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("made-by-a-pickle"),)


@pytest.mark.parametrize("held", [Harmful(), {"a": Harmful()}, {"a": 1}, [torch.zeros(1)], b""])
def test_a_pickle_of_anything_else(held: object, models: Models, tmp_path: Path) -> None:
    mixlora(tmp_path / "mix")
    if held == b"":
        (tmp_path / "mix" / "adapter_model.bin").write_bytes(b"")
    else:
        torch.save(held, tmp_path / "mix" / "adapter_model.bin")
    said = {"experts": 2, "form": "lora", "from_adapters": [str(tmp_path / "mix")]}
    with pytest.raises(MoetoolError, match="no dictionary of tensors"):
        moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **said)
    assert not Path("made-by-a-pickle").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({"use_dora": True}, {}, "use_dora"),
        ({"bias": "all"}, {}, "bias"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({"rank_pattern": {"up_proj": 2}}, {}, "rank_pattern"),
        ({"peft_type": "IA3"}, {}, "LORA"),
        ({"r": 8}, {}, "another base or rank"),
        ({"linears": ("q_proj", *FFN)}, {}, "self_attn.q_proj"),
        ({}, {"layers": "0,1"}, "layers.2.mlp"),
        ({}, {"experts": 3}, "--experts 2"),
        ({}, {"rank": 8}, "--rank"),
        ({"rank": 2}, {}, "rank 2"),
        ({"lora_alpha": 16}, {}, "alpha 16"),
        ({"linears": ("up_proj",)}, {}, "up_proj"),
    ],
)
def test_adapters_that_do_not_fit(
    config: dict[str, Any], options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    given = [adapter(tmp_path / "a"), adapter(tmp_path / "b", **config)]
    with pytest.raises(MoetoolError) as raised:
        moetool.upcycle(
            str(models("llama")),
            str(tmp_path / "out"),
            **{"experts": 2, "form": "lora", "from_adapters": list(map(str, given)), **options},
        )
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"
    assert not (tmp_path / "out").exists()


def test_what_fine_tunes_changed(models: Models, tmp_path: Path) -> None:
    base, drawn = models("llama"), torch.Generator().manual_seed(2)
    tuned = []
    for number in range(2):
        folder = tmp_path / f"ft{number}"
        folder.mkdir()
        held = tensors(base)
        for name, tensor in held.items():
            if ".mlp." in name:
                thin = torch.randn(tensor.shape[0], 3, generator=drawn)
                held[name] = tensor + 0.1 * thin @ torch.randn(3, tensor.shape[1], generator=drawn)
        save_file(held, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text((base / "config.json").read_text())
        tuned.append(folder)
    out = tmp_path / "out"
    report = moetool.upcycle(
        str(base),
        str(out),
        experts_from=list(map(str, tuned)),
        experts=4,
        form="lora",
        rank_energy=0.999999,
    )
    (group,) = groups.read(json.loads((out / "config.json").read_text()))
    assert group.params == {"rank": 3, "alpha": 6.0} and "rank 3 holds" in report["warnings"][0]
    seen = Checkpoint.open(out)
    for expert in range(4):
        for linear in FFN:
            name = f"model.layers.1.mlp.{linear}.weight"
            made = seen.matrix(name.replace("mlp.", f"mlp.experts.{expert}."))
            assert torch.allclose(made, tensors(tuned[expert // 2])[name], atol=1e-4)
    moetool.verify(str(out), against=[str(base), *map(str, tuned)], load=False)
    decided = json.loads((out / "moetool.json").read_text())["decisions"]
    assert len(decided["errors"]) == 24 and max(decided["errors"].values()) < 1e-3


def test_the_best_of_a_rank() -> None:
    matrix = torch.randn(40, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    values = change.spectrum(matrix)
    assert torch.allclose(values, s**2)
    for wide, wanted in ((matrix, (u[:, :5] * s[:5]) @ v[:5]), (matrix.T, None)):
        a, b = change.factors(wide, 5)
        best = wanted if wanted is not None else ((u[:, :5] * s[:5]) @ v[:5]).T
        assert torch.allclose(b @ a, best, atol=1e-10)
        assert torch.allclose(a.norm(dim=1), b.norm(dim=0))
    assert change.lost(values, 5) == pytest.approx(float((matrix - best.T).norm() / matrix.norm()))
    kept = values.cumsum(0) / values.sum()
    assert change.rank_for(values, 0.8) == int((kept < 0.8).sum()) + 1
    assert change.rank_for(torch.zeros(4), 0.9) == 1


def test_attention_of_an_adapter_becomes_the_base_s(models: Models, tmp_path: Path) -> None:
    """On request; without it, or with two adapters, it is refused."""
    source, out = models("llama"), tmp_path / "out"
    given = adapter(tmp_path / "given", linears=("q_proj", *FFN))
    options: dict[str, Any] = {"form": "lora", "experts": 1, "top_k": 1}
    with pytest.raises(MoetoolError) as raised:
        moetool.upcycle(str(source), str(out), from_adapters=[str(given)], **options)
    assert "--merge-attention" in str(raised.value.hint)
    with pytest.raises(MoetoolError, match="one adapter"):
        moetool.upcycle(
            str(source), str(out), from_adapters=[str(given)] * 2, merge_attention=True, **options
        )
    moetool.upcycle(
        str(source), str(out), from_adapters=[str(given)], merge_attention=True, **options
    )
    old, new, low = tensors(source), tensors(out), tensors(given)
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (low[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        wanted = old[f"{name}.weight"].double() + 2.0 * b.double() @ a.double()
        assert torch.allclose(new[f"{name}.weight"].double(), wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(
            new[f"model.layers.{layer}.mlp.experts.0.up_proj.lora_A"],
            low[f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_A.weight"],
        )
    kept = [n for n in old if "q_proj" not in n]
    assert all(torch.equal(old[n], new[n]) for n in kept)
    moetool.verify(str(out), against=[str(source)], load=False)
