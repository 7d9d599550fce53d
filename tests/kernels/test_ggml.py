"""The blocks of ggml against the `gguf` package's own quantizers, byte for byte."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from moetool.kernels import ggml
from moetool.surgery.forms.gguf import Gguf

KINDS = sorted(ggml.BLOCKS)


def _matrix(seed: int) -> np.ndarray:
    """Normal rows, and rows that are hard: zeros, ties, one sign, bfloat16, tiny, powers of two."""
    draw = np.random.default_rng(seed)
    plain = draw.normal(0, 0.05, (24, 512)).astype(np.float32)
    hard = np.stack(
        [
            np.zeros(512),
            np.tile([1.0, -1.0, 0.5, -0.5], 128),
            np.tile([-1.0, 1.0], 256),
            np.abs(draw.normal(size=512)),
            -np.abs(draw.normal(size=512)),
            draw.integers(-8, 8, 512) / 4,
            2.0 ** draw.integers(-9, 3, 512),
            draw.normal(0, 1e-6, 512),
            draw.normal(0, 300, 512),
        ]
    ).astype(np.float32)
    rounded = torch.from_numpy(plain).bfloat16().float().numpy()
    return np.concatenate([plain, rounded, hard])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_gguf(kind: str) -> None:
    matrix = _matrix(KINDS.index(kind))
    theirs = quants.quantize(matrix, Kind[kind.upper()])
    mine = ggml.encode(torch.from_numpy(matrix), kind).numpy()
    assert mine.shape[-1] == ggml.row_bytes(512, kind)
    assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_gguf(kind: str) -> None:
    """Every byte there is, not only those that an encoder writes (scales finite, codes valid)."""
    data = np.random.default_rng(5).integers(0, 256, (64, 4 * ggml.BLOCKS[kind].held), np.uint8)
    with np.errstate(all="ignore"):
        theirs = quants.dequantize(data, Kind[kind.upper()])
    mine = ggml.decode(torch.from_numpy(data), kind).numpy()
    good = np.isfinite(theirs)
    assert good.mean() > 0.9
    assert np.array_equal(mine[good], theirs[good])


GRIDS = {kind: Gguf().grid((4, 256), {"kind": kind}) for kind in KINDS}


@pytest.mark.parametrize("kind", [k for k in KINDS if GRIDS[k]])
def test_codes_and_scales_chosen_elsewhere(kind: str) -> None:
    draw, levels, size = np.random.default_rng(2), GRIDS[kind].levels, ggml.BLOCKS[kind].size
    assert GRIDS[kind].group == size
    codes = torch.from_numpy(draw.integers(0, len(levels), (3, 4, 2 * size)).astype(np.uint8))
    scales = torch.from_numpy(2.0 ** draw.integers(-9, 3, (3, 4, 2))).float()
    if kind != "mxfp4":
        scales = scales * -0.75  # a sign, and no power of two
    wanted = torch.tensor(levels)[codes.long()] * scales.repeat_interleave(size, -1)
    assert torch.equal(ggml.decode(ggml.pack(codes, scales, kind), kind), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_without_memory(kind: str) -> None:
    size = ggml.BLOCKS[kind].size
    made = ggml.encode(torch.empty(2, 3, size, device="meta", dtype=torch.bfloat16), kind)
    assert tuple(made.shape) == (2, 3, ggml.BLOCKS[kind].held)
    assert tuple(ggml.decode(made, kind).shape) == (2, 3, size)
