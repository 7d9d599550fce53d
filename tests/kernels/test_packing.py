"""Codes in words: against integers of any length, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moetool.kernels import grid as grids
from moetool.kernels import packing

SHAPES = [(7, 64), (5, 100), (3, 33), (4, 1), (1, 320), (2, 3, 96)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_code_i_is_bits_i_times_b(bits: int, shape: tuple[int, ...]) -> None:
    """A row is one long number, little end first, and back."""
    dice = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=dice)
    packed = packing.words(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape[-1] == -(-shape[-1] * bits // 32)
    for row, words in zip(codes.flatten(0, -2), packed.flatten(0, -2), strict=True):
        number = sum(int(code) << bits * i for i, code in enumerate(row))
        assert int.from_bytes(words.numpy().tobytes(), "little") == number
    assert torch.equal(packing.codes(packed, bits, shape[-1]), codes)


def test_chunks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 8, (50, 96), dtype=torch.uint8)
    whole = packing.words(codes, 3)
    monkeypatch.setattr(packing, "_CHUNK", 200)
    assert torch.equal(packing.words(codes, 3), whole)
    assert torch.equal(packing.codes(whole, 3, 96), codes)


def test_strided_and_meta() -> None:
    """Slices pack like copies; rehearsals run on the meta device."""
    wide = torch.randint(0, 16, (6, 128), dtype=torch.uint8)
    assert torch.equal(packing.words(wide[:, ::2], 4), packing.words(wide[:, ::2].clone(), 4))
    assert packing.words(wide.to("meta"), 3).shape == (6, 12)
    assert packing.codes(torch.empty(6, 12, dtype=torch.int32, device="meta"), 3, 128).shape == (
        6,
        128,
    )


def test_nothing_is_held_but_codes_and_words() -> None:
    """In bytes that torch asks for at once, beyond the codes themselves."""
    codes = torch.randint(0, 16, (2048, 4096), dtype=torch.uint8)
    for packed in (packing.words(codes, 4), packing.words(codes, 3)):
        assert packed.untyped_storage().nbytes() == packed.numel() * 4 < codes.numel()
    with torch.profiler.profile(profile_memory=True) as seen:
        packing.words(codes, 3)
    assert max(e.cpu_memory_usage for e in seen.events()) <= codes.numel()


def test_levels_of_floats_in_bytes() -> None:
    """Every level of a grid is the byte that stands for it."""
    levels = torch.arange(254, dtype=torch.uint8)
    made = packing.e4m3(levels).float()
    wanted = torch.tensor(grids.e4m3(0, "F32").levels)
    assert torch.equal(made, wanted) and torch.equal(made.signbit(), wanted.signbit())
    sixteen = torch.arange(16, dtype=torch.uint8).repeat(3, 1)
    packed = packing.e2m1(sixteen)
    assert packed.shape == (3, 8) and int(packed[0, 0]) == 14 << 4 | 15
    values, wanted = packing.e2m1_values(packed), torch.tensor(grids.e2m1(32, "E8M0").levels)
    assert torch.equal(values, wanted.repeat(3, 1))
    assert torch.equal(values.signbit(), wanted.signbit().repeat(3, 1))


def test_exponents_of_powers_of_two() -> None:
    powers = torch.tensor([2.0**-127, 2.0**-126, 0.5, 1.0, 2.0**127])
    assert np.array_equal(packing.exponents(powers).numpy(), [0, 1, 126, 127, 254])
