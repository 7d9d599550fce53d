"""Ternary linears: exact where a model is ternary, refused where it is not, read as transformers
reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import moetool as api
from moetool.errors import MoetoolError
from moetool.kernels import ternary
from moetool.surgery.checkpoint import Checkpoint

Made = Callable[..., Path]


def as_ternary(folder: Path) -> dict[str, torch.Tensor]:
    """Make every linear of a model's layers ternary, in place; its tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 2:
            scale = tensor.abs().mean().to(torch.bfloat16).to(tensor.dtype)
            tensors[name] = (tensor / scale).round().clamp(-1, 1) * scale
    save_file(tensors, file, {"format": "pt"})
    return tensors


@pytest.fixture
def model(models: Made, tmp_path: Path) -> Path:
    """A ternary Llama."""
    import shutil

    folder = tmp_path / "source"
    shutil.copytree(models("llama"), folder)
    as_ternary(folder)
    return folder


def test_a_ternary_model_loses_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.quantize(str(model), str(out), format="ternary")
    source, made = Checkpoint.open(model), Checkpoint.open(out)
    held = [n for n, t in made.tensors.items() if t.parts]
    assert len(held) == 7 * source.config["num_hidden_layers"]
    for name in source.tensors:
        assert torch.equal(made.matrix(name).float(), source.matrix(name).float()), name
    back = tmp_path / "back"
    api.dequantize(str(out), str(back))
    again = Checkpoint.open(back)
    for name in source.tensors:
        assert torch.equal(again.matrix(name), source.matrix(name)), name


def test_transformers_unpacks_the_same_weights(model: Path, tmp_path: Path) -> None:
    """By value: AutoBitLinear holds the codes, and multiplies by the scale."""
    out = tmp_path / "out"
    api.quantize(str(model), str(out), format="ternary")
    loaded, source = tiny.load(out), Checkpoint.open(model)
    linears = {n: m for n, m in loaded.named_modules() if type(m).__name__ == "AutoBitLinear"}
    assert len(linears) == 7 * source.config["num_hidden_layers"]
    for name, module in linears.items():
        theirs = module.weight.float() * module.weight_scale.float()
        assert torch.equal(theirs, source.matrix(f"{name}.weight").float()), name


def test_other_models_are_refused(models: Made, tmp_path: Path) -> None:
    with pytest.raises(MoetoolError, match="not ternary"):
        api.quantize(str(models("llama")), str(tmp_path / "out"), format="ternary")
    assert not (tmp_path / "out").exists()
    api.quantize(str(models("llama")), str(tmp_path / "forced"), format="ternary", force=True)
    assert Checkpoint.open(tmp_path / "forced").told


def test_the_divisor_is_read_too(model: Path, tmp_path: Path) -> None:
    """`bitlinear`, the older class, divides by what it calls a scale."""
    import json

    out = tmp_path / "out"
    api.quantize(str(model), str(out), format="ternary")
    expected = {n: Checkpoint.open(out).matrix(n) for n in Checkpoint.open(out).tensors}
    tensors = load_file(out / "model.safetensors")
    for name in tensors:
        if name.endswith("_scale"):
            tensors[name] = 1.0 / tensors[name].float()
    save_file(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["linear_class"] = "bitlinear"
    (out / "config.json").write_text(json.dumps(config))
    divided = Checkpoint.open(out)
    for name, values in expected.items():
        assert torch.allclose(divided.matrix(name).float(), values.float(), rtol=1e-6), name


def test_packing() -> None:
    codes = torch.randint(-1, 2, (64, 24), dtype=torch.int8)
    packed = ternary.packed(codes)
    assert packed.shape == (16, 24) and torch.equal(ternary.unpacked(packed), codes.float())
    for row in (0, 15, 16, 40, 63):  # as transformers' pack_weights: quarter i in bits 2i, 2i + 1
        shift = 2 * (row // 16)
        assert torch.equal((packed[row % 16] >> shift & 3).to(torch.int8) - 1, codes[row])
