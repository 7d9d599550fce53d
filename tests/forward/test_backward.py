"""Gradients layer by layer, against autograd through transformers' whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from moetool.demo import MODEL
from moetool.forward import backward
from moetool.forward.backward import Back, Ends, FfnPass, Kept
from moetool.forward.batches import Batch, Batches
from moetool.forward.walk import Budget
from moetool.surgery.checkpoint import Checkpoint


def batches() -> Batches:
    """Two batches of different lengths, the second with padding."""
    drawn = np.random.default_rng(0)
    made = (
        Batch(drawn.integers(5, 300, (2, 12)), np.array([12, 12]), 0),
        Batch(drawn.integers(5, 300, (2, 9)), np.array([9, 4]), 0),
    )
    return Batches(made, ("text",), (37,), 12, "ids")


def by_autograd(texts: Batches) -> list[list[tuple[Tensor, Tensor]]]:
    """[layer][batch] -> what goes into down_proj and its gradient, real tokens."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    total = sum(int((b.lengths - 1).sum()) for b in texts.batches)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.model.layers]
    for batch in texts.batches:
        seen: list[Tensor] = []
        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0]))
            for layer in model.model.layers
        ]
        ids = torch.from_numpy(batch.ids)
        logits = model(input_ids=ids).logits
        real = torch.from_numpy(batch.valid).view(ids.shape)
        wanted = ids.masked_fill(~real, -100)[:, 1:]
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), wanted.flatten(), reduction="sum"
        )
        for layer, (h, g) in enumerate(
            zip(seen, torch.autograd.grad(loss / total, seen), strict=True)
        ):
            found[layer].append((h.detach()[real], g[real]))
        for hook in hooks:
            hook.remove()
    return found


def ends(layer: int) -> Ends:
    stem = f"model.layers.{layer}.mlp"
    return Ends(f"{stem}.gate_proj.weight", f"{stem}.down_proj.weight")


@pytest.mark.parametrize("logits", [1 << 23, 2000])
def test_gradients_are_those_of_the_whole_model(
    logits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the logits are made a few places at a time."""
    monkeypatch.setattr(backward, "LOGITS", logits)
    texts, wanted = batches(), by_autograd(batches())
    walk = Kept(Checkpoint.open(MODEL), texts, Budget(folder=tmp_path))
    walk.run()
    seen: dict[int, list[FfnPass]] = {}
    Back(walk).run(ends, lambda layer, given: seen.update({layer: list(given)}))
    assert sorted(seen) == list(range(len(wanted)))
    for layer, pairs in enumerate(wanted):
        for (h, gradient), one in zip(pairs, seen[layer], strict=True):
            assert torch.allclose(one.h, h, atol=1e-5) and len(one.x) == len(h)
            assert torch.allclose(
                one.gradient, gradient, atol=1e-6 * float(gradient.abs().max()) + 1e-8, rtol=1e-3
            )


def test_a_way_back_that_was_stopped_goes_on(tmp_path: Path) -> None:
    walk = Kept(Checkpoint.open(MODEL), batches(), Budget(folder=tmp_path))
    walk.run()
    seen: list[int] = []

    def look(layer: int, given: Iterator[FfnPass]) -> None:
        list(given)
        if layer == 1 and len(seen) == 2:
            seen.append(layer)
            raise OSError("no space left")
        seen.append(layer)

    with pytest.raises(OSError, match="no space"):
        Back(walk).run(ends, look)
    assert Back.begun(tmp_path) == 2
    Back(walk).run(ends, look)
    assert seen == [3, 2, 1, 1, 0]
