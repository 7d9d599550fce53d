"""Whole FFNs beside the FFN, which stays always on; and copies made different."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_kinds import tensors
from modeling.grown import IDS, apart
from modeling.test_other_experts import loaded, logits, shaken
from torch import Tensor
from torch.nn import functional

import moetool
from moetool.errors import UsageError
from moetool.modeling.block import blocks

Models = Callable[..., Path]
OWN: dict[str, Any] = {"target": "moetool", "experts": 3}


@pytest.mark.parametrize(
    ("options", "factor"), [({}, 1.0), ({"scale": "0.5"}, 0.5)], ids=["auto", "half"]
)
def test_the_ffn_stays_and_experts_add(
    options: dict[str, Any], factor: float, models: Models, tmp_path: Path
) -> None:
    """Against float64, token by token; at zero output exact, whatever the router says."""
    source, out = models("llama"), tmp_path / "out"
    report = moetool.upcycle(str(source), str(out), shared=True, **OWN, **options)
    model, stock = loaded(out), loaded(source)
    far = apart(logits(model, IDS), logits(stock, IDS))
    assert (far == 0) == (not options) == (report["certificate"]["level"] == "exact")
    shaken(model, ".experts.")
    shaken(model, "router")
    block, x = next(blocks(model)), torch.randn(9, 64)
    at = {n: p.detach().double() for n, p in block.named_parameters()}

    def ffn(h: Tensor, stem: str = "") -> Tensor:
        gate, up, down = (at[f"{stem}{n}_proj.weight"] for n in ("gate", "up", "down"))
        return functional.silu(h @ gate.T) * (h @ up.T) @ down.T

    rows = []
    for token in x.double():
        best, chosen = (at["router.weight"] @ token).topk(2)
        made = ffn(token)
        for weight, e in zip(best.softmax(-1), chosen.tolist(), strict=True):
            scale = at.get(f"experts.{e}.output_scale", torch.ones(1)) * factor
            made = made + weight * scale * ffn(token, f"experts.{e}.")
        rows.append(made)
    with torch.no_grad():
        assert apart(block(x[None])[0].double(), torch.stack(rows)) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), IDS), logits(model, IDS))


def test_experts_of_fine_tunes_beside_a_mean_trunk(models: Models, tmp_path: Path) -> None:
    """The FFN is SRC's, each expert a fine-tune's, byte for byte, and all else the mean."""
    source, other, out = models("llama"), models("llama", seed=1), tmp_path / "out"
    how = {"shared": True, "trunk": "mean", "scale": "1", **OWN, "experts": 2}
    report = moetool.upcycle(
        str(source), str(out), experts_from=[str(other)], expert_map="1,0", **how
    )
    assert report["certificate"]["level"] == "none" and report["trunks"][0]["distance"] != 0
    a, b, made = tensors(source), tensors(other), tensors(out)
    for name, held in a.items():
        whole = held if ".mlp." in name else (held.double() + b[name].double()) / 2
        assert torch.allclose(made[name].double(), whole.double(), rtol=1e-6), name
        if ".mlp." in name:
            head, _, tail = name.rpartition(".mlp.")
            assert torch.equal(made[f"{head}.mlp.experts.0.{tail}"], b[name])
            assert torch.equal(made[f"{head}.mlp.experts.1.{tail}"], held)
    moetool.verify(str(out), against=[str(source), str(other)], load=False)


def test_copies_differ_as_in_a_stock_class(models: Models, tmp_path: Path) -> None:
    """The same bytes as experts of Mixtral."""
    source, how = models("llama"), {"experts": 3, "diversify": "mask:0.4+noise:0.1+drop:0.25"}
    moetool.upcycle(str(source), str(tmp_path / "own"), target="moetool", **how)
    moetool.upcycle(str(source), str(tmp_path / "native"), target="mixtral", **how)
    own, native = tensors(tmp_path / "own"), tensors(tmp_path / "native")
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    compared = 0
    for name, held in own.items():
        if ".experts." in name:
            head, _, tail = name.partition(".mlp.experts.")
            expert, linear, part = tail.split(".")
            there = f"{head}.block_sparse_moe.experts.{expert}.{names[linear]}.{part}"
            assert torch.equal(held, native[there]), name
            compared += 1
    assert compared == 36


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_neurons_in_another_order_compute_the_same(
    family: str, models: Models, tmp_path: Path
) -> None:
    """Two matrices in one, and biases, which go with their neurons."""
    source, out = models(family), tmp_path / "out"
    report = moetool.upcycle(str(source), str(out), diversify="permute", **OWN)
    assert report["certificate"]["level"] == "exact"
    one, two = _two(tensors(out))
    assert not torch.equal(one, two)
    assert apart(logits(loaded(out), IDS), logits(loaded(source), IDS)) <= 1e-5


def _two(made: dict[str, Tensor]) -> list[Tensor]:
    """The same matrix of two experts."""
    first = next(n for n in sorted(made) if ".experts.0." in n and n.endswith(".weight"))
    return [made[first], made[first.replace(".experts.0.", ".experts.1.")]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": "2"}, "beside the FFN"),
        ({"shared": True, "scale": "0"}, "none for experts"),
        ({"shared": True, "site": "attention"}, "--site ffn"),
        ({"diversify": "mask:0.5", "site": "norms", "key": "modality"}, "--site ffn"),
    ],
)
def test_what_does_not_go_together(
    options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **{**OWN, **options})
