"""Models with groups of experts where stock models go: trainers, offload, compilers, other dtypes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from modeling import grown
from modeling.grown import IDS, apart
from modeling.test_groups_run import BESIDE, LORA, TERNARY, loaded, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moetool.errors import MoetoolError
from moetool.modeling import balance
from moetool.modeling.balance import Scores
from moetool.modeling.block import blocks
from moetool.surgery import shim
from moetool.surgery.groups import Group

Tensor = torch.Tensor
CODES = Group("ternary", 4, (1,), "codes", base="beside", params={"group": 32}, route=BESIDE)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny Llama with low-rank experts in two layers and ternary ones in a third."""
    root = tmp_path_factory.mktemp("train")

    def get(dtype: str = "float32") -> Path:
        out = root / dtype
        if not out.exists():
            source = grown.base("llama", root / f"base-{dtype}", dtype)
            grown.write(source, out, LORA, replace(TERNARY, layers=(3,)), CODES, random=True)
        return out

    return get


def test_bf16_leaves_packed_codes_and_scales_alone(model_of: Any, tmp_path: Path) -> None:
    model = loaded(model_of("bfloat16"))
    for name, held in model.named_parameters():
        wanted = torch.float32 if name.endswith("_scale") else torch.bfloat16
        assert held.dtype == (torch.uint8 if name.endswith("_packed") else wanted), name
    assert torch.isfinite(logits(model)).all()
    model.save_pretrained(tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (model_of("bfloat16"), tmp_path))
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype for n in before)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert (tmp_path / shim.FILE).read_text() == shim.TEXT
    half = loaded(model_of(), dtype=torch.bfloat16)
    scales = {n: p for n, p in half.named_parameters() if n.endswith("_scale")}
    whole = load_file(model_of() / "model.safetensors")
    assert len(scales) == 28 and all(torch.equal(p, whole[n]) for n, p in scales.items())


def test_layers_on_disk_compute_the_same(model_of: Any, tmp_path: Path) -> None:
    usual = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    layers = {f"model.layers.{n}": "cpu" if n == 2 else "disk" for n in range(4)}
    model = loaded(model_of(), device_map=usual | layers, offload_folder=tmp_path)
    assert model.model.layers[0].mlp.experts[0].gate_proj.lora_A.is_meta
    assert apart(logits(model), logits(loaded(model_of()))) <= 1e-6


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    made = model(input_ids=IDS, labels=IDS, output_router_logits=True)
    made.loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients(model_of: Any) -> None:
    model = loaded(model_of()).train()
    plain = gradients(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    again = gradients(model)
    kinds = ("lora_A", "lora_B", "router.weight", "weight_scale", "output_scale", "q_proj.weight")
    assert all(any(n.endswith(kind) for n in plain) for kind in kinds)
    assert plain.keys() == again.keys()
    assert all(torch.equal(g, again[n]) for n, g in plain.items())
    assert not [n for n in plain if n.endswith("weight_packed")]


def test_gradients_are_those_of_experts_in_full(model_of: Any) -> None:
    """Of x through each block, against the block's float64 reference."""
    from modeling.test_groups_run import dense

    held = [*blocks(loaded(model_of()))]
    for block in (held[0], held[1], held[3]):
        (group, _), *_ = block.held
        x = torch.randn(9, 64, generator=torch.Generator().manual_seed(3))
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        block(mine[None]).square().sum().backward()
        dense(block, group, theirs).square().sum().backward()
        assert apart(mine.grad, theirs.grad) <= 1e-5


@pytest.mark.slow
def test_torch_compile(model_of: Any) -> None:
    model = loaded(model_of())
    stock = logits(model)
    with torch._dynamo.config.patch(suppress_errors=False):
        made = torch.compile(model, backend="aot_eager")
        assert apart(logits(made), stock) <= 1e-6
    torch._dynamo.reset()


def test_balance_is_one_where_even_and_shows_what_a_pool_hides() -> None:
    even = Scores(torch.zeros(8, 4), torch.arange(8)[:, None] % 4)
    assert float(balance.of_layer(even)) == pytest.approx(1)
    one, other = torch.full((8, 4), -30.0), torch.full((8, 4), -30.0)
    one[:, :2], other[:, 2:] = 0.0, 0.0
    halves = [Scores(s, s.topk(2).indices) for s in (one, other)]
    assert float(balance.mean(halves)) == pytest.approx(2)  # a pool of both would say 1
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    skewed = Scores(torch.zeros(8, 4), torch.tensor([0, 1, 2, 3, 0, 0, 0, 0])[:, None])
    assert float(balance.mean([skewed], mask)) == pytest.approx(1)
    assert balance.mean([]) is None


def test_what_trainers_ask_of_a_mixture(model_of: Any) -> None:
    model = loaded(model_of())
    off = model(input_ids=IDS, labels=IDS)
    assert off.aux_loss is None and off.router_logits is None
    on = model(input_ids=IDS, labels=IDS, output_router_logits=True)
    assert len(on.router_logits) == 4 and on.router_logits[0].shape == (48, 4)
    coefficient = model.config.router_aux_loss_coef
    assert float(on.loss.detach()) == pytest.approx(
        float((off.loss + coefficient * on.aux_loss).detach())
    )
    assert torch.equal(on.logits, off.logits)
    assert len(model(input_ids=IDS, output_router_logits=True, return_dict=False)) == 4
    alone = model.base_model(input_ids=IDS, output_router_logits=True)  # as TRL does
    assert all(
        torch.equal(a, b) for a, b in zip(alone.router_logits, on.router_logits, strict=True)
    )
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (4, 2)
    model.config.output_router_logits = True
    assert len(model(input_ids=IDS).router_logits) == 4


def test_the_trainer_trains_and_saves(model_of: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = loaded(model_of())
    model.config.output_router_logits = True
    for name, held in model.named_parameters():
        held.requires_grad_("lora" in name or "router" in name)
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(2, 1)]
    said = {"per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "max_steps": 2}
    args = TrainingArguments(str(tmp_path), learning_rate=1e-2, save_strategy="no", **said)
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    before, after = (load_file(f / "model.safetensors") for f in (model_of(), tmp_path / "saved"))
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all("lora" in n or "router" in n for n in moved)
    assert any("router" in n for n in moved) and any("lora_A" in n for n in moved)
    assert apart(logits(loaded(tmp_path / "saved")), logits(trainer.model)) == 0


_LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["moetool"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for folder in sys.argv[1:]:
    for how in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}, None):
        try:
            if how is None:
                LlamaForCausalLM.from_pretrained(folder)
            else:
                AutoModelForCausalLM.from_pretrained(folder, **how)
        except Exception as problem:
            print("REFUSED", problem)
        else:
            print("LOADED")
"""


def test_without_moetool_there_is_an_error_and_never_a_model(model_of: Any, tmp_path: Path) -> None:
    env = os.environ | {"HF_HOME": str(tmp_path), "TRANSFORMERS_VERBOSITY": "error"}
    plain = tmp_path / "plain"  # a copy that somebody took the code's file and its name out of
    shutil.copytree(model_of(), plain)
    (plain / shim.FILE).unlink()
    config = json.loads((plain / "config.json").read_text())
    del config["auto_map"]
    (plain / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", _LOAD, str(model_of()), str(plain)]
    run = {"capture_output": True, "text": True, "env": env, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, check=False, **run)
    assert "LOADED" not in done.stdout, done.stdout
    _, *said = done.stdout.split("REFUSED")
    assert len(said) == 8, done.stdout + done.stderr
    assert all("custom code" in one for one in said[:2]) and "pip install moetool" in said[2]
    assert all("does not recognize this architecture" in one for one in said[4:7])
    assert all('experts_implementation="moetool"' in one for one in (said[3], said[7]))


def test_a_missing_tensor_of_a_group_is_no_warning(model_of: Any, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    shutil.copytree(model_of(), lost)
    held = load_file(lost / "model.safetensors")
    gone = next(name for name in sorted(held) if "router" in name)
    save_file({n: t for n, t in held.items() if n != gone}, lost / "model.safetensors")
    with pytest.raises(MoetoolError, match="a tensor of a group of experts is missing") as problem:
        AutoModelForCausalLM.from_pretrained(lost)
    assert problem.value.where["tensor"] == gone
    with pytest.raises(ValueError, match="experts_implementation"):
        transformers.LlamaForCausalLM.from_pretrained(model_of())
