"""Bytes to numbers and back, in every dtype of safetensors that torch knows."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from moetool.errors import MoetoolError
from moetool.kernels import codec

FLOATS = ("F64", "F32", "BF16", "F16")
INTEGERS = {"I64": 2**62, "I32": 2**30, "I16": 2**14, "I8": 100, "U8": 200}


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, "BOOL", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 4), (2, 3, 2), ()], ids=str)
def test_bytes_come_back(dtype: str, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    size = count * codec.torch_dtype(dtype).itemsize
    data = bytes([1] * size) if dtype == "BOOL" else bytes(range(1, size + 1))
    value = codec.decode(bytearray(data), dtype, shape)
    assert value.shape == shape and value.dtype == codec.torch_dtype(dtype)
    assert bytes(codec.encode(value, dtype)) == data


def test_decoding_shares_memory() -> None:
    """A matrix is not held twice."""
    data = bytearray(struct.pack("<2f", 1.0, 2.0))
    value = codec.decode(data, "F32", (2,))
    data[:4] = struct.pack("<f", 9.0)
    assert value.tolist() == [9.0, 2.0]


def test_encoding_a_transposed_view_writes_rows() -> None:
    matrix = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    wanted = struct.pack("<6f", 0, 3, 1, 4, 2, 5)
    assert bytes(codec.encode(matrix.T, "F32")) == wanted
    assert bytes(codec.encode(matrix.numpy().T, "F32")) == wanted


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers(dtype: str) -> None:
    top = INTEGERS[dtype]
    values = [0, 1, top] if dtype == "U8" else [0, -1, top, -top]
    made = codec.encode(torch.tensor(values, dtype=torch.int64), dtype)
    assert codec.decode(bytearray(made), dtype, (len(values),)).tolist() == values


def test_a_dtype_that_nobody_computes_with() -> None:
    for dtype in ("C64", "F4", "U64", "what"):
        with pytest.raises(MoetoolError, match=f"none to compute with: {dtype}"):
            codec.torch_dtype(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_meta_has_no_memory(dtype: str) -> None:
    value = codec.meta((10**6, 10**6), dtype)
    assert value.is_meta and value.dtype == codec.torch_dtype(dtype)


def exact(bits: int) -> Fraction:
    """The value of a finite bfloat16 by its definition."""
    sign, exponent, fraction = bits >> 15, (bits >> 7) & 0xFF, bits & 0x7F
    whole = fraction + (128 if exponent else 0)
    return (-1) ** sign * whole * Fraction(2) ** (max(exponent, 1) - 134)


def test_bfloat16_rounds_to_the_nearest_and_halves_to_even() -> None:
    """Against exact fractions: random numbers, every kind of tie, subnormals."""
    dice = np.random.default_rng(0)
    drawn = dice.standard_normal(300) * 10.0 ** dice.integers(-30, 30, 300)
    near = [1 + k / 512 for k in range(8)] + [3e-40, -3e-40, 0.0, 1.17e-38, -1.1754944e-38]
    values = np.concatenate([drawn, near]).astype(np.float32)
    made = np.frombuffer(codec.encode(values, "BF16"), np.uint16)
    for value, bits in zip(values.tolist(), made.tolist(), strict=True):
        error = abs(exact(bits) - Fraction(value))
        for other in (bits - 1, bits + 1):
            if 0 <= other & 0x7FFF < 0x7F80:
                apart = abs(exact(other) - Fraction(value))
                assert error < apart or (error == apart and bits % 2 == 0)
    twice = np.frombuffer(codec.encode(torch.from_numpy(values), "BF16"), np.uint16)
    assert (made == twice).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_float64_without_torch_is_torchs(dtype: str) -> None:
    value = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = bytes(codec.encode(value, dtype))
    wanted = codec.decode(bytearray(data), dtype, (200,)).double().numpy()
    assert (codec.as_float64(data, dtype) == wanted).all()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_infinities_survive(dtype: str) -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan")])
    data = codec.encode(values, dtype)
    back = codec.decode(bytearray(data), dtype, (3,)).tolist()
    assert back[:2] == [float("inf"), float("-inf")] and back[2] != back[2]
    read = codec.as_float64(bytes(data), dtype)
    assert read[0] == np.inf and read[1] == -np.inf and np.isnan(read[2])
