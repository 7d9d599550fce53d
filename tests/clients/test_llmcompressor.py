"""llm-compressor quantizes what moetool writes: groups of 128 must fit an idle shared expert too.
Opt-in, see tests/clients/__init__.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from clients.others import python
from clients.outputs import OUTPUTS
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import whole

pytestmark = pytest.mark.clients
SCRIPT = Path(__file__).parents[1] / "bench" / "peer_llmcompressor_quantize.py"


@pytest.mark.parametrize("how", ["rtn", "gptq"])
def test_groups_of_128_fit_a_shared_expert_that_is_idle(tmp_path: Path, how: str) -> None:
    """Every linear of the layer is packed, the values are numbers, and they are the source's."""
    asked, out = python("llm-compressor"), tmp_path / "out"
    source = OUTPUTS["qwen2-qwen2_moe"].write(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": list(range(10, 138))}) + "\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [asked, SCRIPT, source, rows, how, out, "int4/128"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    made, full = Checkpoint.open(str(out)), Checkpoint.open(str(source))
    packed = {n for n, t in made.tensors.items() if t.parts and t.parts.params["group"] == 128}
    assert "model.layers.0.mlp.shared_expert.down_proj.weight" in packed
    assert len(packed) == 2 * (4 + 3 * (4 + 1))  # attention; experts and the idle one
    for name in packed:
        read, was = made.matrix(whole(made.tensors[name])), full.matrix(whole(full.tensors[name]))
        assert torch.isfinite(read).all()
        assert (read - was).norm() <= 0.2 * was.norm(), name
