"""Models with groups of experts in the trainers that people have, where these are installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.grown import IDS, apart

import moetool
from moetool.demo import MODEL

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of each other
Models = Callable[..., Path]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=IDS).logits
    return made


def train(model: Any, steps: int) -> None:
    step = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        step.step()
        step.zero_grad()


def made(kind: str, source: Path, folder: Path) -> Path:
    """`source` with experts of a form; or its FFN copied, and another number of copies a layer."""
    out = folder / "out"
    if kind != "ragged":
        moetool.upcycle(str(source), str(out), form=kind, experts=4, router="normal:0.1")
        return out
    mixture, decisions = folder / "mixture", folder / "decisions.json"
    moetool.upcycle(str(source), str(mixture), experts=4, router="normal:0.1")
    layers = {str(n): {"keep": [*range(2 + n % 3)]} for n in range(4)}
    said = {"schema": 1, "verb": "prune", "method": "random", "experts": 4, "layers": layers}
    decisions.write_text(json.dumps(said))
    moetool.prune(str(mixture), str(out), decisions=str(decisions))
    return out


@pytest.mark.parametrize("kind", ["lora", "ternary", "sparse", "ragged"])
def test_peft_trains_the_attention_and_saves(kind: str, models: Models, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    out = made(kind, models("llama"), tmp_path)
    wrapped = moetool.load(out)
    before = {n: p.detach().clone() for n, p in wrapped.named_parameters()}
    model = peft.get_peft_model(
        wrapped, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")
    )
    train(model, steps=2)
    model.save_pretrained(tmp_path / "adapter")
    again = moetool.load(out)
    plain = logits(again)
    adapted = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert apart(logits(adapted), logits(model)) <= 1e-6
    assert apart(logits(model), plain) > 1e-3
    after = {
        n: p for n, p in wrapped.named_parameters() if "lora_A.d" not in n and "lora_B.d" not in n
    }
    own = {n.replace(".base_layer", ""): p for n, p in after.items()}
    assert own.keys() == before.keys()
    assert all(torch.equal(own[n], before[n]) for n in before)


def test_what_peft_trained_becomes_an_expert_and_the_base(models: Models, tmp_path: Path) -> None:
    """A folder that PEFT saved, of FFNs and attention: read with --merge-attention it computes what
    PEFT does, to the rounding of the attention's sums.
    """
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    source, out = models("llama"), tmp_path / "out"
    ffn, attention = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "o_proj"]
    told = peft.LoraConfig(target_modules=[*ffn, *attention], r=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(source), told)
    train(model, steps=3)
    model.save_pretrained(tmp_path / "adapter")
    options: dict[str, Any] = {"form": "lora", "experts": 1, "top_k": 1, "merge_attention": True}
    moetool.upcycle(str(source), str(out), from_adapters=[str(tmp_path / "adapter")], **options)
    read = moetool.load(out)
    assert apart(logits(read), logits(model)) <= 1e-5
    assert apart(logits(AutoModelForCausalLM.from_pretrained(source)), logits(model)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "ternary", "adapter", "ragged"])
def test_trl_logs_the_balance(kind: str, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import AutoTokenizer

    out = made(kind, Path(MODEL), tmp_path)
    lines = ["In the beginning was the word.", "And the light shone in the darkness."] * 4
    how = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=32,
        router_aux_loss_coef=0.01,
    )
    model = moetool.load(out)
    model.config.output_router_logits = True
    trainer = trl.SFTTrainer(
        model=model,
        args=how,
        train_dataset=datasets.Dataset.from_dict({"text": lines}),
        processing_class=AutoTokenizer.from_pretrained(out),
    )
    trainer.train()
    seen = [row["aux_loss"] for row in trainer.state.log_history if "aux_loss" in row]
    assert len(seen) == 2 and all(0.1 < value < 10 for value in seen), trainer.state.log_history
    trainer.save_model(str(tmp_path / "saved"))
    assert apart(logits(moetool.load(tmp_path / "saved")), logits(trainer.model)) <= 1e-6
