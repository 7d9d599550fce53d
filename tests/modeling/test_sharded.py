"""What wraps modules by the names of their classes: FSDP by accelerate and torch, DeepSpeed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.dataclasses import get_module_class_from_name

import moetool


@pytest.fixture(scope="module")
def grown(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, source = tmp_path_factory.mktemp("sharded"), str(models("llama"))
    outs = [folder / form for form in ("lora", "ternary", "full")]
    for out in outs:
        more = {"target": "moetool"} if out.name == "full" else {}
        told = {"experts": 3, "router": "normal:0.3", "form": out.name}
        moetool.upcycle(source, str(out), **told, **more)
    return outs


def test_names_to_wrap_are_of_modules_that_are_there(grown: list[Path]) -> None:
    """accelerate refuses a name that no module has; the block is found as ZeRO-3's leaf."""
    for out in grown:
        model = moetool.load(out)
        for version in (1, 2):
            policy = "transformer_based_wrap"
            plugin = FullyShardedDataParallelPlugin(fsdp_version=version, auto_wrap_policy=policy)
            plugin.set_auto_wrap_policy(model)
            layers = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
            assert layers == {type(model.model.layers[0])}
        leaf = get_module_class_from_name(model, "MoeLlamaMLP")
        assert leaf is type(model.model.layers[0].mlp)


_SHARDED = """
import copy, os, sys
import torch, torch.distributed as dist
import moetool
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def work(rank, folders, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh, ids = init_device_mesh("cpu", (2,)), torch.arange(5, 45).reshape(2, 20)
    told = {"input_ids": ids, "labels": ids, "output_router_logits": True}
    for folder in folders:
        model = moetool.load(folder, dtype="float32").train()
        for held in model.parameters():
            held.requires_grad_(held.is_floating_point())
        whole = copy.deepcopy(model)
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        mine, theirs = model(**told), whole(**told)
        assert torch.equal(mine.loss, theirs.loss) and float(mine.aux_loss) > 0
        mine.loss.backward()
        theirs.loss.backward()
        grads = {n: p.grad for n, p in whole.named_parameters()}
        for name, held in model.named_parameters():
            assert (held.grad is None) == (grads[name] is None), name
            if held.grad is not None:
                torch.testing.assert_close(held.grad.full_tensor(), grads[name])
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[2:], sys.argv[1]), nprocs=2)
    print("alike")
"""


@pytest.mark.slow
def test_fsdp_computes_the_same(grown: list[Path], tmp_path: Path) -> None:
    """Two processes, a half of every layer each: loss and gradients of the whole model."""
    script = tmp_path / "sharded.py"
    script.write_text(_SHARDED)
    words = [sys.executable, "-W", "ignore", script, tmp_path / "store", *grown]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert "alike" in done.stdout, done.stderr[-2000:]
