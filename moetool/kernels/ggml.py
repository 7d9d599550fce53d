"""The blocks of ggml: how llama.cpp stores matrices in few bits, one file a kind of block.

A row of `size` weights is one block of `held` bytes: a scale d (float16; a power of two in mxfp4),
where there is one a minimum m (float16), and the codes. Bytes and values are those of the `gguf`
package's own quantizers, which are those of llama.cpp: tests hold them against each
other. Blocks lie along the input dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

Tensor = torch.Tensor
_STEP = 1 << 18  # weights worked on at once: what lies in the cache
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12)  # E2M1, doubled: mxfp4 keeps half of its scale


@dataclass(frozen=True)
class BlockKind:
    """One kind: weights and bytes of a block, and the way there and back. `rounded` gives codes
    and scales of float32 [blocks, size] as llama.cpp rounds; `packed` lays them; `values` reads.
    """

    size: int
    held: int
    rounded: Callable[[Tensor], tuple[Tensor, ...]]
    packed: Callable[..., Tensor]
    values: Callable[[Tensor], Tensor]


def encode(matrix: Tensor, kind: str) -> Tensor:
    """[..., columns] -> uint8 [..., bytes a row], each block to nearest as llama.cpp rounds."""
    block = BLOCKS[kind]
    return _stepwise(matrix, block.size, block.held, lambda x: block.packed(*block.rounded(x)))


def pack(codes: Tensor, scales: Tensor, kind: str) -> Tensor:
    """codes [..., columns] (the number of each weight's level, ascending) and scales [..., columns
    / size], both chosen elsewhere -> uint8 [..., bytes a row].
    """
    block = BLOCKS[kind]
    flat, d = codes.reshape(-1, block.size), scales.reshape(-1, 1).float()
    if kind == "mxfp4":
        flat, d = _signed_fp4(flat), (d.log2().round() + 127).to(torch.uint8)
    elif kind == "q8_0":
        flat = flat.to(torch.int16) - 127
    made = block.packed(flat, d)
    return made.reshape(*codes.shape[:-1], codes.shape[-1] // block.size * block.held)


def decode(data: Tensor, kind: str) -> Tensor:
    """uint8 [..., bytes a row] -> float32 [..., columns]."""
    block = BLOCKS[kind]
    return _stepwise(data, block.held, block.size, block.values, torch.float32)


def row_bytes(columns: int, kind: str) -> int:
    """Bytes of a row of a matrix."""
    return columns // BLOCKS[kind].size * BLOCKS[kind].held


def _stepwise(
    x: Tensor,
    size: int,
    made: int,
    work: Callable[[Tensor], Tensor],
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """`work` over the blocks of x, some at a time."""
    flat = x.reshape(-1, size)
    out = torch.empty(len(flat), made, dtype=dtype, device=x.device)
    step = max(1, _STEP // max(size, made))
    for start in range(0, len(flat), step):
        some = flat[start : start + step]
        out[start : start + step] = work(some if some.dtype == torch.uint8 else some.float())
    return out.reshape(*x.shape[:-1], x.shape[-1] // size * made)


# --- what several kinds share


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, torch.zeros_like(d), 1 / d)


def _half(*numbers: Tensor) -> list[Tensor]:
    """float16, as bytes."""
    return [n.to(torch.float16).contiguous().view(torch.uint8) for n in numbers]


def _read_half(data: Tensor, at: int) -> Tensor:
    return data[:, at : at + 2].contiguous().view(torch.float16).float()


def _away(x: Tensor) -> Tensor:
    """Rounded to nearest, halves away from zero (roundf; torch rounds them to even)."""
    size = x.abs()
    low = size.floor()
    return x.sign() * (low + (2 * (size - low)).floor())


def _extreme(x: Tensor) -> Tensor:
    """The first value of each block that has the largest size, with its sign."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    sure = torch.where(high > -low, high, low)
    tie = (high == -low) & (high > 0)
    if x.is_meta or not bool(tie.any()):
        return sure
    size, count = high[tie[:, 0]], x.shape[1]
    order = torch.arange(count, dtype=torch.int16, device=x.device)
    rows = x[tie[:, 0]]
    first = torch.where(rows.abs() == size, order, count).amin(1, keepdim=True)
    return sure.masked_scatter(tie, rows.gather(1, first.long()))


def _nibbles(codes: Tensor) -> Tensor:
    """Two a byte: the first half of a block in the lower, the second in the upper."""
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return (low & 15) | (high & 15) << 4


def _read_nibbles(data: Tensor) -> Tensor:
    return torch.cat([data & 15, data >> 4], -1)


def _bits(codes: Tensor) -> Tensor:
    """The fifth bit of 32 codes in 4 bytes, the first in the lowest."""
    ones = (codes.to(torch.uint8) >> 4).reshape(len(codes), 4, 8)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (ones << places).sum(-1, dtype=torch.uint8)


def _read_bits(data: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data[:, :, None] >> places) & 1).reshape(len(data), 32) << 4


# --- one scale: q4_0, q5_0, q8_0


def _round_signed(half: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The largest value lies on the end of the grid that has one level more, whatever its sign."""

    def rounded(x: Tensor) -> tuple[Tensor, ...]:
        d = _extreme(x) / -half
        codes = (x * _inverse(d) + (half + 0.5)).trunc().clamp(0, 2 * half - 1)
        return codes, d

    return rounded


def _pack_q4_0(codes: Tensor, d: Tensor) -> Tensor:
    return torch.cat([*_half(d), _nibbles(codes)], -1)


def _read_q4_0(data: Tensor) -> Tensor:
    return _read_half(data, 0) * (_read_nibbles(data[:, 2:]).float() - 8)


def _pack_q5_0(codes: Tensor, d: Tensor) -> Tensor:
    return torch.cat([*_half(d), _bits(codes), _nibbles(codes)], -1)


def _read_q5_0(data: Tensor) -> Tensor:
    codes = _read_nibbles(data[:, 6:]) | _read_bits(data[:, 2:6])
    return _read_half(data, 0) * (codes.float() - 16)


def _round_q8_0(x: Tensor) -> tuple[Tensor, ...]:
    d = x.abs().amax(1, keepdim=True) / 127
    return _away(x * _inverse(d)), d


def _pack_q8_0(codes: Tensor, d: Tensor) -> Tensor:
    return torch.cat([*_half(d), codes.to(torch.int8).view(torch.uint8)], -1)


def _read_q8_0(data: Tensor) -> Tensor:
    return data[:, 2:].contiguous().view(torch.int8).float() * _read_half(data, 0)


# --- a scale and a minimum: q4_1, q5_1


def _round_above(most: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def rounded(x: Tensor) -> tuple[Tensor, ...]:
        least = x.amin(1, keepdim=True)
        d = (x.amax(1, keepdim=True) - least) / most
        return ((x - least) * _inverse(d) + 0.5).trunc().clamp(0, most), d, least

    return rounded


def _pack_q4_1(codes: Tensor, d: Tensor, m: Tensor) -> Tensor:
    return torch.cat([*_half(d, m), _nibbles(codes)], -1)


def _read_q4_1(data: Tensor) -> Tensor:
    return _read_half(data, 0) * _read_nibbles(data[:, 4:]).float() + _read_half(data, 2)


def _pack_q5_1(codes: Tensor, d: Tensor, m: Tensor) -> Tensor:
    return torch.cat([*_half(d, m), _bits(codes), _nibbles(codes)], -1)


def _read_q5_1(data: Tensor) -> Tensor:
    codes = _read_nibbles(data[:, 8:]) | _read_bits(data[:, 4:8])
    return _read_half(data, 0) * codes.float() + _read_half(data, 2)


# --- E2M1 with a power of two: mxfp4


def _round_mxfp4(x: Tensor) -> tuple[Tensor, ...]:
    """The scale is the largest exponent less 2; what lies above 6 is cut."""
    most = x.abs().amax(1, keepdim=True)
    exponent = most.double().log2().float().floor() + 125
    held = torch.where(most > 0, exponent, torch.zeros_like(most)).clamp(0, 254).to(torch.uint8)
    size = x.abs() / _halved(held)
    codes = torch.zeros_like(size, dtype=torch.uint8)
    for low, high in pairwise(_FP4):
        codes += size > (low + high) / 2
    return codes | ((x < 0) & (codes > 0)).to(torch.uint8) << 3, held


def _signed_fp4(codes: Tensor) -> Tensor:
    """Numbers of the 16 ascending levels, both zeros among them -> sign and magnitude."""
    return torch.where(codes < 8, 15 - codes, codes - 8)


def _halved(exponents: Tensor) -> Tensor:
    """Exponent + 127 -> half of that power of two, in float32."""
    bits = exponents.int()
    small = torch.where(bits < 1, 0x00200000, 0x00400000).to(torch.int32)
    return torch.where(bits < 2, small, (bits - 1) << 23).view(torch.float32)


def _pack_mxfp4(codes: Tensor, exponents: Tensor) -> Tensor:
    return torch.cat([exponents, _nibbles(codes)], -1)


def _read_mxfp4(data: Tensor) -> Tensor:
    doubled = torch.tensor((*_FP4, *(-n for n in _FP4)), device=data.device).float()
    return doubled[_read_nibbles(data[:, 1:]).long()] * _halved(data[:, :1])


# --- ternary, 256 to a scale: tq1_0 (five to a byte) and tq2_0 (four to a byte)

_POWERS = (81, 27, 9, 3, 1)


def _round_ternary(x: Tensor) -> tuple[Tensor, ...]:
    d = x.abs().amax(1, keepdim=True)
    return _away(x * _inverse(d)) + 1, d


def _threes(codes: Tensor, depth: int) -> Tensor:
    """[blocks, depth * width] codes of 0 to 2, one from each of `depth` runs to a byte: a fraction
    of 243 in 256ths.
    """
    powers = torch.tensor(_POWERS[:depth], dtype=torch.int32, device=codes.device)
    total = (codes.reshape(len(codes), depth, -1).int() * powers[:, None]).sum(1)
    return torch.div(total * 256 + 242, 243, rounding_mode="floor").to(torch.uint8)


def _read_threes(data: Tensor, depth: int) -> Tensor:
    powers = torch.tensor((1, 3, 9, 27, 81)[:depth], dtype=torch.int32, device=data.device)
    turned = (data[:, None, :].int() * powers[:, None]) & 255
    return ((turned * 3) >> 8).reshape(len(data), -1)


def _pack_tq1_0(codes: Tensor, d: Tensor) -> Tensor:
    runs = (_threes(codes[:, :160], 5), _threes(codes[:, 160:240], 5), _threes(codes[:, 240:], 4))
    return torch.cat([*runs, *_half(d)], -1)


def _read_tq1_0(data: Tensor) -> Tensor:
    runs = (
        _read_threes(data[:, :32], 5),
        _read_threes(data[:, 32:48], 5),
        _read_threes(data[:, 48:52], 4),
    )
    return _read_half(data, 52) * (torch.cat(runs, -1).float() - 1)


def _pack_tq2_0(codes: Tensor, d: Tensor) -> Tensor:
    two = codes.to(torch.uint8).reshape(len(codes), 2, 4, 32)
    packed = two[:, :, 0] | two[:, :, 1] << 2 | two[:, :, 2] << 4 | two[:, :, 3] << 6
    return torch.cat([packed.reshape(len(codes), 64), *_half(d)], -1)


def _read_tq2_0(data: Tensor) -> Tensor:
    places = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=data.device)[:, None]
    codes = (data[:, :64].reshape(len(data), 2, 1, 32) >> places) & 3
    return _read_half(data, 64) * (codes.reshape(len(data), -1).float() - 1)


BLOCKS = {
    "q4_0": BlockKind(32, 18, _round_signed(8), _pack_q4_0, _read_q4_0),
    "q4_1": BlockKind(32, 20, _round_above(15), _pack_q4_1, _read_q4_1),
    "q5_0": BlockKind(32, 22, _round_signed(16), _pack_q5_0, _read_q5_0),
    "q5_1": BlockKind(32, 24, _round_above(31), _pack_q5_1, _read_q5_1),
    "q8_0": BlockKind(32, 34, _round_q8_0, _pack_q8_0, _read_q8_0),
    "mxfp4": BlockKind(32, 17, _round_mxfp4, _pack_mxfp4, _read_mxfp4),
    "tq1_0": BlockKind(256, 54, _round_ternary, _pack_tq1_0, _read_tq1_0),
    "tq2_0": BlockKind(256, 66, _round_ternary, _pack_tq2_0, _read_tq2_0),
}
