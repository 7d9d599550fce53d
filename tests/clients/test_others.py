"""The reload matrix for other loaders: transformers 4.57, vLLM and mlx-lm, each in an environment
of its own (see tests/clients/__init__.py; llama.cpp: test_llamacpp.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from clients import cells, others, shapes
from moetool.errors import MoetoolError
from moetool.surgery import forms

pytestmark = pytest.mark.clients

BF16 = 1 / 128  # a step of it: 4.57 rounds nvfp4 once more
# mlx-lm's model of DeepSeek-V3 takes more than its data promises: fp8 blocks are turned to bf16.
MLX_MORE = (("deepseek_v3", "fp8-block"),)
# vLLM's CPU build has kernels for these; of others its source says what a GPU does.
VLLM = {
    "llama": ("int4", "fp8", "fp8-block", "w8a8", "int3"),
    "qwen3_moe": ("int4", "int4/64", "fp8-block", "fp8-block-ct", "w8a8", "nvfp4"),
    "mixtral": ("int4", "fp8-block", "w8a8", "mxfp4"),
}
VLLM_LACKS = ("kernel", "backend", "AssertionError", "not supported")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("others")


def asked(
    root: Path, loader: str, family: str, words: Sequence[str]
) -> list[tuple[cells.Cell, dict[str, Any]]]:
    """Each cell that can be written, and what the loader makes of it."""
    others.python(loader)
    jobs, made = [], []
    for word in words:
        cell = cells.Cell(family, word, root)
        try:
            jobs.append([*cell.write(loader), cell.source])
        except MoetoolError as refusal:
            assert refusal.where.get("tensor") and refusal.hint, refusal
        else:
            made.append(cell)
    assert made
    return list(zip(made, others.ask(loader, jobs, root), strict=True))


def short() -> list[str]:
    """Every format of safetensors, one of many widths."""
    return [w for w in cells.formats() if not w.startswith(cells.SLOW)]


@pytest.mark.parametrize("family", shapes.OVERRIDES)
def test_transformers_4(root: Path, family: str) -> None:
    for cell, answer in asked(root, "transformers4", family, short()):
        state, form = cell.state("transformers4"), forms.asked(cell.format).form
        said, near = (family, cell.format, answer), cells.NEAR.get(form, 0.0)
        if state == "refuses":
            assert answer["state"] == "raises", said
            continue
        assert answer["state"] == "equal" or (form == "nvfp4" and answer["worst"] < BF16), said
        assert (answer["linears"] <= near) == (state == "works"), said


@pytest.mark.parametrize("family", shapes.OVERRIDES)
def test_mlx(root: Path, family: str) -> None:
    for cell, answer in asked(root, "mlx", family, short()):
        state, said = cell.state("mlx"), (family, cell.format, answer)
        if (family, cell.format) in MLX_MORE:
            assert answer == {"state": "read", "logits": 0.0}, said
        elif state == "wrong":
            assert answer["state"] == "raises" or answer["logits"] > 0.1, said
        else:
            assert state == "untried" or answer["state"] == "raises", said


@pytest.mark.parametrize("family", VLLM)
def test_vllm(root: Path, family: str) -> None:
    """What its CPU build reads is right: nearer to the dequantized than what rounding changes. Where
    it rounds activations too, they count for more than weights do: 2e-3 for int8 in this Qwen3-MoE,
    when the input of every linear of the dequantized model is rounded instead.
    """
    read = []
    for cell, answer in asked(root, "vllm", family, VLLM[family]):
        said = (family, cell.format, answer)
        if answer["state"] == "raises":
            assert any(word in answer["said"] for word in VLLM_LACKS), said
            continue
        read.append(cell.format)
        both = cells.NEAR.get(forms.asked(cell.format).form, 0.0) > 0
        near = (2, 5e-3) if both else (0.1, 1e-3)
        assert answer["kl"] < max(near[0] * answer["rounding"], near[1]), said
    assert {"int4", "fp8-block", "w8a8"} <= set(read), read
