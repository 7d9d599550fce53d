"""Experts behind a projector that the text of a prompt chooses, as the image sees it (Parrot)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.grown import apart
from modeling.test_other_experts import shaken
from modeling.test_sites_projector import IMAGE, loaded
from torch import Tensor
from torch.nn import functional

import moetool
from moetool.errors import UsageError
from moetool.modeling.block import blocks

Models = Callable[..., Path]
RECIPE = Path(__file__).resolve().parents[2] / "recipes/upcycle/parrot.yaml"
IDS = torch.tensor([[0, 7, 11, *[IMAGE] * 4, 13, 17, 19], [*[IMAGE] * 4, 21, 22, 23, 24, 25, 26]])
MASK = torch.tensor([[0] + [1] * 9, [1] * 10])
LABELS = torch.where(torch.arange(10) < 8, -100, IDS)
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))


def made(models: Models, out: Path, **more: Any) -> Any:
    moetool.run(
        str(RECIPE), source=str(models("llava")), out=str(out), **{"adapter-dim": 16, **more}
    )
    return loaded(out)


def said(model: Any, **more: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, pixel_values=PIXELS, **more)


def as_its_code(model: Any, features: Tensor, text: Tensor, residual: float) -> Tensor:
    """One image [tokens, width] and the ids of one prompt's text, in float64."""
    (block,) = blocks(model)
    at = {n: p.detach().double() for n, p in block.named_parameters()}
    words = model.get_input_embeddings().weight.detach().double()[text]
    share = (features[:1] @ words.T / features.shape[-1] ** 0.5).softmax(-1)
    weight = (at["router.weight"] @ (share @ words)[0]).softmax(-1)
    total = residual * features
    for e in range(6):
        down, gate, up = (at[f"experts.{e}.adapter_{n}.weight"] for n in ("down", "gate", "up"))
        total = (
            total + weight[e] * (functional.silu(features @ gate.T) * (features @ down.T)) @ up.T
        )
    return total


@pytest.mark.parametrize(
    ("start", "residual"), [("zero", 1.0), ("drawn", 0.1)], ids=["exact", "official"]
)
def test_as_its_code_says(start: str, residual: float, models: Models, tmp_path: Path) -> None:
    """What the projector gives, of each image of a padded batch, where labels say what is asked,
    and where nothing does.
    """
    more = {"adapter-start": start, "adapter-residual": residual}
    model, stock = made(models, tmp_path / "out", **more), loaded(models("llava"))
    far = apart(said(model).logits, said(stock).logits)
    assert far <= 1e-5 if start == "zero" else far > 1e-3
    shaken(model, "router.weight")
    if start == "zero":
        shaken(model, "adapter_up")
    (block,), seen = blocks(model), []
    block.register_forward_hook(lambda *call: seen.append(call))
    for more in ({}, {"labels": LABELS}):
        said(model, **more)
        _, (given,), found = seen.pop()
        features = block.own_ffn(given.detach().reshape(-1, given.shape[-1])).detach().double()
        for row, image in enumerate(features.view(*found.shape)):
            counts = MASK[row].bool() & (IDS[row] != IMAGE)
            counts = counts & (LABELS[row] == -100) if more else counts
            wanted = as_its_code(model, image, IDS[row, counts], residual)
            assert apart(found[row].double(), wanted) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(said(loaded(tmp_path / "again")).logits, said(model).logits)


def test_the_router_learns_and_the_choice_stays(models: Models, tmp_path: Path) -> None:
    model = made(models, tmp_path / "out")
    for part in ("router.weight", "adapter_up"):
        shaken(model, part)
    how = {"attention_mask": MASK, "pixel_values": PIXELS, "max_new_tokens": 4, "do_sample": False}
    how |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    cached, whole = (model.generate(IDS, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    assert apart(torch.stack(cached.logits), torch.stack(whole.logits)) < 1e-4
    out = model.train()(
        input_ids=IDS, pixel_values=PIXELS, labels=LABELS, output_router_logits=True
    )
    assert float(out.aux_loss.detach()) > 0.5
    out.loss.backward()
    (block,) = blocks(model)
    assert block.router.weight.grad.any() and block.experts[5].adapter_gate.weight.grad.any()


def test_what_it_cannot_see_is_said(models: Models, tmp_path: Path) -> None:
    model = made(models, tmp_path / "out")
    with pytest.raises(UsageError, match="do not lie in the text"):
        model(input_ids=IDS, pixel_values=PIXELS[:1])
    with pytest.raises(UsageError, match="need to know the text"):
        model(inputs_embeds=torch.randn(1, 4, 64))
    with pytest.raises(UsageError, match="what a call of the text model says") as refused:
        moetool.upcycle(str(models("llava")), str(tmp_path / "x"), form="lora", key="attended")
    assert "--tower projector" in str(refused.value)
    with pytest.raises(UsageError, match="behind an FFN"):
        how = {"adapter_residual": 0.5, "adapter_at": "before", "adapter_dim": 8}
        moetool.upcycle(str(models("llama")), str(tmp_path / "y"), form="adapter", **how)
