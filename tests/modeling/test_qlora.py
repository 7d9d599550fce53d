"""QLoRA: groups of experts over a base that bitsandbytes quantizes while it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from modeling.grown import IDS, apart
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import moetool

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of the CPU they run on
TRAINED = (".router.", ".experts.")


def load(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **more)


def logits(model: Any) -> torch.Tensor:
    """In training mode: without gradients bitsandbytes multiplies in bf16 on some CPUs."""
    made: torch.Tensor = model.train()(input_ids=IDS).logits.detach()
    return made


@pytest.mark.parametrize("form", ["lora", "ternary", "adapter", "full", "sparse"])
def test_groups_stand_over_a_base_in_four_bits(
    form: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Base linears are what nf4 makes of them, everything else bit for bit; logits are those of
    the model in full with the same values; the Trainer moves experts and nothing else.
    """
    out, more = tmp_path / "out", {"target": "moetool"} if form == "full" else {}
    source = str(models("llama", head_dim=32))
    moetool.upcycle(source, str(out), form=form, experts=3, router="normal:0.3", **more)
    told = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    told.bnb_4bit_compute_dtype = torch.float32
    model, full = load(out, quantization_config=told), load(out)
    known = dict(full.named_parameters()) | dict(full.named_buffers())
    four = []
    for name, held in (*model.named_parameters(), *model.named_buffers()):
        if type(held).__name__ != "Params4bit":
            assert held.dtype == known[name].dtype and torch.equal(held, known[name]), name
            continue
        four.append(name)
        rounded = bnb.dequantize_4bit(*bnb.quantize_4bit(known[name].data, quant_type="nf4"))
        known[name].data.copy_(rounded)
    assert len(four) == (16 if form == "full" else 28)  # experts in full take the FFN's place
    assert not any("experts" in name or "router" in name for name in four)
    assert apart(logits(model), logits(full)) <= 1e-6
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, held in model.named_parameters():
        held.requires_grad_(held.is_floating_point() and any(word in name for word in TRAINED))
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    how = {"report_to": [], "use_cpu": True, "max_steps": 2, "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path / "run"), learning_rate=1e-2, **how)
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved and all(any(word in name for word in TRAINED) for name in moved)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert apart(logits(again), logits(model)) <= 1e-6
    if form == "lora":  # whose own verbs read bases in full
        with pytest.raises(moetool.MoetoolError, match="want it in full"):
            moetool.inspect(str(tmp_path / "saved"))
