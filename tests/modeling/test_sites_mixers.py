"""Projections of state-space mixers by modality: written by the command, run in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modeling import grown
from modeling.grown import apart
from modeling.test_other_experts import CHECKPOINTING, IMAGE, MIXED, loaded, logits, shaken
from safetensors.torch import load_file

import moetool
from moetool.errors import MoetoolError
from moetool.modeling.block import blocks

COPY = {"key": "modality", "experts": 1, "top_k": 1, "modality_ids": str(IMAGE), "site": "mixer"}


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_exact_at_birth_with_one_cache_and_the_same_gradients(family: str, tmp_path: Path) -> None:
    source, out = grown.base(family, tmp_path / "source"), tmp_path / "out"
    report = moetool.upcycle(str(source), str(out), **COPY)
    assert report["certificate"]["level"] == "exact"
    model, stock = loaded(out), logits(loaded(source), MIXED)
    assert apart(logits(model, MIXED), stock) <= 1e-5
    held = {name for block in blocks(model) for name in block.linears.names}
    assert held == {"in_proj", "out_proj"} | ({"x_proj", "dt_proj"} if family == "mamba" else set())
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (out, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in after
    )
    text = logits(model, MIXED[:, :2])
    shaken(model, ".experts.")
    assert apart(logits(model, MIXED), stock) > 1e-3
    assert torch.equal(logits(model, MIXED[:, :2]), text)
    told = model.generate(MIXED, max_new_tokens=4, do_sample=False, use_cache=True)
    plain = model.generate(MIXED, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(told, plain)
    with torch.no_grad():  # an image token out of the cache
        seen = model(input_ids=MIXED[:, :5], use_cache=True).cache_params
        step = model(input_ids=MIXED[:, 5:6], cache_params=seen, use_cache=True).logits
    assert apart(step[:, -1], logits(model, MIXED[:, :6])[:, -1]) <= 1e-5


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_gradients_of_training_and_with_checkpointing(family: str, tmp_path: Path) -> None:
    source, out = grown.base(family, tmp_path / "source"), tmp_path / "out"
    moetool.upcycle(str(source), str(out), **COPY)
    found = []
    for saved in (False, True):
        model = loaded(out).train()
        if saved:
            getattr(model, CHECKPOINTING, model.gradient_checkpointing_enable)()
        model(input_ids=MIXED, labels=MIXED).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    stock = loaded(source).train()
    stock(input_ids=MIXED, labels=MIXED).loss.backward()
    (plain, again), shared = found, 0
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[n], again[n], atol=1e-6) for n in plain)
    for (
        name,
        held,
    ) in stock.named_parameters():  # copies at birth share the gradient of their source
        head, _, part = name.rpartition("proj.")
        copy = plain.get(
            f"{head.rpartition('.')[0]}.experts.0.{head.rpartition('.')[2]}proj.{part}"
        )
        if ".mixer." in name and copy is not None:
            shared += 1
            assert torch.allclose(plain[name] + copy, held.grad, atol=1e-5), name
    assert shared == (2 * 5 if family == "mamba" else 2 * 2)


def test_other_families_have_no_mixer(models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MoetoolError, match="no place for groups of experts at the site mixer"):
        moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **COPY)
