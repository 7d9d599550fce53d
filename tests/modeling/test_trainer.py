"""Every law and every key in the Trainer of transformers: two steps, layers that run again, bf16,
the balance loss with its coefficient, and frozen parameters that do not move by a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.grown import IDS
from modeling.test_other_experts import shaken
from modeling.test_routes import made
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import moetool
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.methods.upcycle.laws.law import RouteLaw
from moetool.methods.upcycle.word import words
from moetool.modeling.anneal import Annealing
from moetool.modeling.piece import GrownPart

Models = Callable[..., Path]
LORA: dict[str, Any] = {"form": "lora", "rank": 4, "experts": 4}
HEADS = {"site": "heads", "shared_heads": 1, "active_heads": 2}
# word -> what it needs
LAWS: dict[str, dict[str, Any]] = {
    "hard": {"top_k": 1},
    "hard-chosen": {"top_k": 1, "straight": "chosen"},
    "hard-all": {"top_k": 1, "straight": "all"},
    "hard-balance": {"top_k": 1, "straight": "balance"},
    "expert_choice": {},
    "expert_choice-foreseen": {"auxiliary": True, "score": "sigmoid", "score_noise": True},
    "filled": {"lora_mix": "linears", "gate_noise": 0.1},
    "gumbel": {"temperature": 2.0},
    "renormalised": {},
    "sigmoid": {},
    "soft": {"temperature": 0.5},
    "softmax": {"form": "ternary", "rank": 16},
    "top_p": {},
}
# key -> what it needs, and what a batch says beside its tokens
KEYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "always": ({}, {}),
    "domain": ({"domains": "@"}, {}),
    "modality": ({"modality_ids": "5"}, {}),
    "modality-full": ({"form": "full", "experts": 1, "modality_ids": "5"}, {}),
    "neurons": ({"neurons": "3,30,77,127"}, {}),
    "noise": ({"noise_dim": 8}, {"noise": torch.tensor([0.3, -1.2])}),
    "pooled": ({}, {}),
    "pooled-linear": ({"site": "linear", "law": "filled", "prompt_from": "7"}, {}),
    "query": ({**HEADS, "law": "hard", "straight": "all"}, {}),
    "sequence": ({}, {}),
    "task": ({}, {"task": torch.tensor([2, 0])}),
    "token": ({}, {}),
    "token-heads": (HEADS, {}),
    "twopass": ({"site": "linear", "law": "soft"}, {}),
    "token-shared": ({"target": "moetool", "experts": 3, "shared": True}, {}),
}
_AGAIN = next(f.name for f in fields(TrainingArguments) if f.name.endswith("_checkpointing"))
EVEN = {"always", "task", "modality-full"}  # nobody has a choice


class Seeing(Trainer):  # type: ignore[misc]
    """It keeps what the model says of its balance."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[float | None] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, out = super().compute_loss(model, inputs, True, kwargs.get("num_items_in_batch"))
        found = out.get("aux_loss")
        self.seen.append(None if found is None else float(found.detach()))
        return (loss, out) if args and args[0] else loss


def trained(folder: Path, out: Path, said: dict[str, Any], **more: Any) -> Seeing:
    """Two steps of what groups have; the rest is frozen."""
    model = moetool.load(folder, dtype=torch.bfloat16)
    for part in ("lora_B", "router.weight"):
        shaken(model, part)
    parts = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, GrownPart))
    for name, held in model.named_parameters():
        held.requires_grad_(name.startswith(parts) and held.is_floating_point())
    if not any(p.requires_grad for p in model.parameters()):  # heads: nothing is new
        for name, held in model.named_parameters():
            held.requires_grad_("q_proj" in name)
    model.config.output_router_logits = True
    each = [{n: v[i] for n, v in said.items()} for i in range(2)]
    rows = IDS.repeat(2, 1)
    rows[:, 3:6] = 5  # another modality
    data = [{"input_ids": ids, "labels": ids, **each[i % 2]} for i, ids in enumerate(rows)]
    how = TrainingArguments(
        str(out),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **{_AGAIN: True},
    )
    trainer = Seeing(model=model, args=how, train_dataset=data, **more)
    trainer.train()
    return trainer


def check(folder: Path, tmp_path: Path, said: dict[str, Any], balanced: bool, **more: Any) -> None:
    """Trained is what may be, and the balance is some, where anybody has a choice."""
    before = moetool.load(folder, dtype=torch.bfloat16)
    for part in ("lora_B", "router.weight"):
        shaken(before, part)
    trainer = trained(folder, tmp_path / "run", said, **more)
    start, moved = dict(before.named_parameters()), set()
    for name, held in trainer.model.named_parameters():
        assert torch.isfinite(held).all() and held.dtype == start[name].dtype, name
        if not torch.equal(held, start[name]):
            assert held.requires_grad, name
            moved.add(name)
    routed = any("router." in name for name in start)
    assert moved and any("router." in name for name in moved) == (routed and balanced)
    assert len(trainer.seen) == 2
    assert all((x is not None and x > 0.1) == balanced for x in trainer.seen), trainer.seen
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, held in trainer.model.named_parameters():
        if name in saved:
            assert torch.equal(saved[name], held), name


def test_every_word_is_here() -> None:
    assert {name.partition("-")[0] for name in LAWS} == set(words(RouteLaw))
    assert {name.partition("-")[0] for name in KEYS} | {"attended"} == set(words(RouteKey))


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_laws(law: str, models: Models, tmp_path: Path) -> None:
    how = {**LORA, "law": law.partition("-")[0], **LAWS[law]}
    how = {n: v for n, v in how.items() if n != "rank" or how["form"] == "lora"}
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **how)
    more = {"callbacks": [Annealing(2.0, 0.3, 2)]} if law == "gumbel" else {}
    check(tmp_path / "out", tmp_path, {}, True, **more)


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_keys(key: str, models: Models, tmp_path: Path) -> None:
    options, said = KEYS[key]
    if key == "domain":
        out = made(key, models, tmp_path)
    else:
        out, how = tmp_path / "out", {**LORA, "key": key.partition("-")[0], **options}
        if {"form", "target", "shared_heads"} & options.keys():
            how = {"key": how["key"], **options}
        moetool.upcycle(str(models("llama")), str(out), **how)
    check(out, tmp_path, said, key not in EVEN)
