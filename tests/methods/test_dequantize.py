"""Everything full again: exact in float32, and told to a loader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moetool import dequantize, quantize
from moetool.errors import MoetoolError
from moetool.surgery.checkpoint import Checkpoint


@pytest.mark.parametrize("format", ["int4/32", "fp8", "nf4", "mxfp4"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_there_and_back(
    format: str, dtype: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    source = models("mixtral", dtype="bfloat16")
    quantize(str(source), str(tmp_path / "small"), format=format)
    report = dequantize(str(tmp_path / "small"), str(tmp_path / "full"), dtype=dtype)
    held = {"auto": "BF16", "float32": "F32"}[dtype]
    assert report["certificate"]["level"] == "exact_if" and held in report["certificate"]["why"]
    small, full, before = (
        Checkpoint.open(p) for p in (tmp_path / "small", tmp_path / "full", source)
    )
    assert set(full.tensors) == set(small.tensors) and not full.told
    assert full.config["dtype"] == {"auto": "bfloat16", "float32": "float32"}[dtype]
    for name, stored in full.tensors.items():
        packed = small.tensors[name].parts is not None
        assert stored.dtype == (held if packed else small.tensors[name].dtype)
        decoded = small.matrix(name)
        assert torch.equal(full.matrix(name).float(), decoded.to(full.matrix(name).dtype).float())
        if not packed:
            assert torch.equal(full.matrix(name), before.matrix(name))
    with pytest.raises(MoetoolError, match="nothing in this checkpoint is quantized"):
        dequantize(str(tmp_path / "full"), str(tmp_path / "again"))
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert "quantization_config" not in config
