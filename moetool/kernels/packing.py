"""Codes of a few bits -> words, and back, little end first along the input dimension: 32 codes of b
bits in b words of 32 bits (compressed-tensors' pack-quantized), or two codes of 4 bits a byte.

Eight codes lie in a word of 64 bits, a byte each; three shifts bring them together. So every number
of bits is one road, and nothing is held but the codes, a few rows at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moetool.kernels.blockscale import FP4

Tensor = torch.Tensor
_CHUNK = 1 << 18  # codes worked on at once: what lies in the cache
_EVEN = (0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF)  # lanes of 8, 16, 32 bits
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # what eight codes of so many bits fill


def words(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [..., columns] below 2^bits -> int32 [..., ceil(columns * bits / 32)]."""
    columns = codes.shape[-1]
    count = -(-columns * bits // 32)
    flat = codes.reshape(-1, columns)
    made = torch.empty((len(flat), count), dtype=torch.int32, device=codes.device)
    for some in _rows(len(flat), columns):
        part = F.pad(flat[some], (0, -columns % 32)) if columns % 32 else flat[some].contiguous()
        if bits != 8:
            part = _gathered(part.view(torch.int64), bits)
        made[some] = part.view(torch.int32)[:, :count]
    return made.reshape(*codes.shape[:-1], count)


def codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `words`: uint8 [..., columns]."""
    count = packed.shape[-1]
    flat = packed.reshape(-1, count)
    made = torch.empty((len(flat), columns), dtype=torch.uint8, device=packed.device)
    for some in _rows(len(flat), columns):
        part = F.pad(flat[some], (0, -count % bits)) if count % bits else flat[some].contiguous()
        part = part.view(torch.uint8)
        if bits != 8:
            part = _scattered(part, bits).view(torch.uint8)
        made[some] = part[:, :columns]
    return made.reshape(*packed.shape[:-1], columns)


def e2m1(levels: Tensor) -> Tensor:
    """Levels of `grid.e2m1`, uint8 [..., columns] -> two a byte, uint8 [..., columns / 2]."""
    halves = _signed(levels, 8).bitwise_and_(15).view(torch.uint8)
    return words(halves, 4).view(torch.uint8)[..., : levels.shape[-1] // 2]


def e2m1_levels(packed: Tensor) -> Tensor:
    """The inverse: uint8 [..., columns / 2] -> levels uint8 [..., columns]."""
    found = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return found ^ torch.where(found < 8, 8, 15).to(torch.uint8)


def e2m1_values(packed: Tensor) -> Tensor:
    """The same, as numbers: uint8 [..., columns / 2] -> float32 [..., columns]."""
    values = torch.tensor((*FP4, *(-v for v in FP4)), device=packed.device)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], -1).view(torch.int64)
    both = pairs[:, 0][packed.int()]
    return both.view(torch.float32)


def e4m3(levels: Tensor) -> Tensor:
    """Levels of `grid.e4m3`, uint8 -> float8_e4m3fn."""
    return _signed(levels, 127).view(torch.float8_e4m3fn)


def _signed(levels: Tensor, zero: int) -> Tensor:
    """Levels of which `zero` is the first that is not negative -> a sign above a size, int8."""
    made = (levels - zero).view(torch.int8)
    below = made.clamp(-1, 0).bitwise_and_((1 << (zero - 1).bit_length()) - 1)
    return made.bitwise_xor_(below)


def exponents(powers: Tensor) -> Tensor:
    """Powers of two in float32 -> their exponents + 127, uint8."""
    return (powers.contiguous().view(torch.int32) // (1 << 23)).to(torch.uint8)


def _rows(count: int, columns: int) -> list[slice]:
    """Some rows at a time."""
    step = max(1, _CHUNK // max(1, columns))
    return [slice(start, start + step) for start in range(0, count, step)]


def _gathered(eights: Tensor, bits: int) -> Tensor:
    """int64 [rows, n], eight codes in each, a byte a code -> uint8 [rows, n * bits]."""
    for lane, even in zip((8, 16, 32), _EVEN, strict=True):
        odd = (eights >> lane).bitwise_and_(even)
        eights = (eights & even).bitwise_or_(odd.bitwise_left_shift_(bits * lane // 8))
    whole = _WHOLE.get(bits)
    if whole is not None:
        return eights.view(whole)[:, :: 8 // bits].contiguous().view(torch.uint8)
    return eights.view(torch.uint8).reshape(len(eights), -1, 8)[..., :bits].flatten(-2)


def _scattered(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_gathered`: uint8 [rows, n * bits] -> int64 [rows, n]."""
    whole = _WHOLE.get(bits)
    if whole is not None:
        eights = packed.view(whole).long().bitwise_and_((1 << 8 * bits) - 1)
    else:
        spread = F.pad(packed.reshape(len(packed), -1, bits), (0, 8 - bits))
        eights = spread.view(torch.int64)[..., 0]
    for lane in (32, 16, 8):
        held = bits * lane // 8
        low = _lanes(held, 2 * lane)
        odd = (eights >> held).bitwise_and_(low)
        eights = (eights & low).bitwise_or_(odd.bitwise_left_shift_(lane))
    return eights


def _lanes(held: int, lane: int) -> int:
    """64 bits: the lowest `held` of each lane."""
    return sum(((1 << held) - 1) << start for start in range(0, 64, lane))
