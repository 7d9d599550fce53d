"""fp8 and mxfp4: what bytes say, edge blocks included, and rounding to the nearest that fits."""

from __future__ import annotations

import numpy as np
import packed
import pytest
import torch

from moetool.kernels import blockscale

BLOCKS = [(128, 128), (32, 32), (16, 48)]
SHAPES = [(64, 96), (80, 100), (7, 5), (129, 33)]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Values of very different size."""
    dice = np.random.default_rng(seed)
    return (dice.normal(size=shape) * np.exp(dice.normal(size=shape))).astype(np.float32)


def torch_of(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_fp8_is_value_times_scale(shape: tuple[int, int], block: tuple[int, int]) -> None:
    codes, scales, says = packed.fp8(random(*shape), block)
    made = blockscale.decode_fp8(torch_of(codes), torch.from_numpy(scales), block)
    assert made.dtype == torch.float32 and np.array_equal(made.numpy(), says)


def test_every_byte_of_fp8() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    made = blockscale.decode_fp8(torch_of(codes), torch.ones(1, 1), (128, 128)).numpy()
    assert np.array_equal(made.reshape(-1), packed.e4m3(), equal_nan=True)


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 40, 70)])
def test_fp8_rounds_to_the_nearest(shape: tuple[int, ...], scale: torch.dtype) -> None:
    """Half a step of E4M3 at most: 1/16 of a value, or half the smallest step of its block."""
    matrix = torch.from_numpy(random(*shape))
    power = scale == torch.uint8
    codes, scales = blockscale.encode_fp8(matrix, (32, 32), scale, power=power)
    assert scales.dtype == scale and codes.dtype == torch.float8_e4m3fn
    made = blockscale.decode_fp8(codes, scales, (32, 32))
    room = (blockscale.powers(scales) if power else scales.float()) * 2.0**-10 * 1.001
    steps = room.repeat_interleave(32, -2).repeat_interleave(32, -1)
    steps = steps[..., : shape[-2], : shape[-1]]
    assert ((made - matrix).abs() <= torch.maximum(steps, matrix.abs() / 15.9)).all()


def test_fp8_of_zeros_is_zeros() -> None:
    codes, scales = blockscale.encode_fp8(torch.zeros(40, 40), (32, 32), torch.float32)
    assert not blockscale.decode_fp8(codes, scales, (32, 32)).any() and (scales == 1).all()


def test_mxfp4_as_transformers_reads_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    dice = np.random.default_rng(1)
    blocks = torch.from_numpy(dice.integers(0, 256, (3, 10, 2, 16), dtype=np.uint8))
    scales = torch.from_numpy(dice.integers(1, 250, (3, 10, 2), dtype=np.uint8))
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(blockscale.decode_mxfp4(blocks, scales), expected)


def test_mxfp4_is_written_as_it_was_read() -> None:
    """Whatever mxfp4 says, it can say again."""
    stack = random(2, 64, 6)
    blocks, scales, says = packed.mxfp4(stack)
    made = blockscale.decode_mxfp4(torch.from_numpy(blocks), torch.from_numpy(scales))
    assert np.array_equal(made.numpy(), says)
    again = blockscale.decode_mxfp4(*blockscale.encode_mxfp4(made))
    assert torch.equal(again, made)


def test_mxfp4_rounds_no_worse_than_the_standard() -> None:
    """The scale of the standard clips what lies above 6; ours never leaves a larger error."""
    stack = random(4, 96, 20, seed=3)
    ours = blockscale.decode_mxfp4(*blockscale.encode_mxfp4(torch.from_numpy(stack))).numpy()
    theirs = packed.mxfp4(stack)[2]

    def error(made: np.ndarray) -> np.ndarray:
        groups = (made - stack).transpose(0, 2, 1).reshape(4, 20, 3, 32)
        return np.square(groups).sum(-1)

    assert (error(ours) <= error(theirs) * (1 + 1e-5)).all()
    assert error(ours).sum() < error(theirs).sum()


def test_shapes_without_memory() -> None:
    """Rehearsals run on the meta device."""
    wide = torch.empty(3, 96, 40, device="meta")
    codes, scales = blockscale.encode_fp8(wide, (32, 32), torch.float32)
    assert scales.shape == (3, 3, 2)
    assert blockscale.decode_fp8(codes, scales, (32, 32)).shape == wide.shape
    blocks, exponents = blockscale.encode_mxfp4(wide)
    assert blocks.shape == (3, 40, 3, 16)
    assert blockscale.decode_mxfp4(blocks, exponents).shape == wide.shape
