"""Every way of every verb that computes, on a device beside the CPU: skipped where there is none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moetool
from moetool.methods.merge.way import MergeWay
from moetool.methods.prune.way import PruneWay
from moetool.surgery.checkpoint import Checkpoint

DEVICE = os.environ.get("MOETOOL_TEST_DEVICE", "cuda")  # cpu: whether this test itself is right
NEAR = 1e-3  # of a tensor's norm: two machines add in another order
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"
)


def _cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for way in PruneWay.known():
        own = {"total_sparsity": 0.4, "ratio": 0.25} if way == "stun" else {}
        yield "prune", {"method": way, **own}
        yield "prune", {"method": way, "refit": False, **own}
    for way in MergeWay.known():
        yield "merge", {"method": way}
    for word in ("int4/32", "int2/32", "nf4", "mxfp4", "fp8"):
        yield "quantize", {"plan": f"experts={word}", "loader_check": False}
        yield "quantize", {"plan": f"experts={word}", "loader_check": False, "method": "rtn"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    dice = np.random.default_rng(2)
    rows = [{"input_ids": dice.integers(10, 150, 40).tolist()} for _ in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("verb", "options"), list(_cases()), ids=str)
def test_it_makes_what_the_cpu_makes(
    verb: str,
    options: dict[str, Any],
    text: Path,
    models: Callable[..., Path],
    tmp_path: Path,
) -> None:
    family = "gpt_oss" if options.get("method") == "mone" else "qwen3_moe"
    source = models(family, dtype="bfloat16", hidden_size=64, moe_intermediate_size=64)
    more = {"calibrate": [str(text)], "tokens": 1600, "seq_len": 40}
    made = []
    for device in ("cpu", DEVICE):
        out = tmp_path / device
        told = options if options.get("method") == "rtn" else options | more
        getattr(moetool, verb)(str(source), str(out), device=device, **told)
        made.append(Checkpoint.open(out))
    assert made[0].tensors.keys() == made[1].tensors.keys()
    was = Checkpoint.open(source)
    for name in made[0].tensors:
        one, other = (m.matrix(name).float() for m in made)
        if verb != "quantize":
            assert float((one - other).norm()) <= NEAR * float(one.norm()), name
        elif (before := was.matrix(name).float()).ne(one).any():
            # a weight between two levels may go to either, and those after it make up for it
            lost, too = (float((m - before).norm()) for m in (one, other))
            assert abs(lost - too) <= 0.1 * lost, name
