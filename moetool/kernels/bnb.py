"""Matrices as bitsandbytes stores them: packed codes of 4 bits, scales rounded to 8 bits a second
time, and rows of 8-bit integers. Its arithmetic, so that the bytes are those of its own quantizers
(bitsandbytes.functional 0.50, CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from moetool.kernels.rounding import Rounded

Tensor = torch.Tensor
NESTED = 256  # scales that share a scale
_STEPS = 65535  # what its CPU kernel rounds to before it looks up a code of 8 bits
_CHUNK = 1 << 18
_PARALLEL = 1 << 15  # torch adds up more values than these in an order that depends on its threads


@dataclass(frozen=True)
class Nested:
    """Scales in 8 bits: `codes` uint8 [n], `scales` float32 [n / 256], and what was taken off
    before (`offset`, their mean).
    """

    codes: Tensor
    scales: Tensor
    offset: Tensor


def pack(codes: Tensor) -> Tensor:
    """uint8 codes below 16, an even count -> uint8 [count / 2, 1], the first in the high half."""
    flat = codes.reshape(-1)
    return flat[0::2].bitwise_left_shift(4).bitwise_or_(flat[1::2])[:, None]


def unpack(packed: Tensor, scales: Tensor, table: Tensor, block: int) -> Tensor:
    """Packed codes, float32 scales [blocks] and the 16 levels by code -> the weights, flat."""
    each = torch.arange(256, device=table.device)
    pairs = torch.stack([table[each >> 4], table[each & 15]], 1).view(torch.float64).view(-1)
    halves = packed.reshape(-1).view(torch.uint8)
    made = torch.empty(2 * len(halves), dtype=torch.float32, device=halves.device)
    both = made.view(torch.float64)  # one look-up for the two weights of a byte
    for start in range(0, len(halves), _CHUNK):
        some = slice(start, start + _CHUNK)
        torch.index_select(pairs, 0, halves[some].int(), out=both[some])
    full = len(made) - len(made) % block
    made[:full].view(-1, block).mul_(scales[: full // block, None])
    if full < len(made):
        made[full:].mul_(scales[-1])
    return made


def nest(scales: Tensor) -> Nested:
    """float32 scales [n] -> what double quantization leaves of them."""
    offset = _mean(scales)
    blocks = F.pad(scales - offset, (0, -len(scales) % NESTED)).view(-1, NESTED)
    most = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / most.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    steps = scaled.add_(1).mul_(0.5).mul_(_STEPS).add_(0.5).int()
    codes = _lookup().to(scales.device)[steps].mul_((most > 0)[:, None])
    return Nested(codes.view(-1)[: len(scales)], most, offset)


def unnest(nested: Nested, table: Tensor) -> Tensor:
    """The inverse: float32 [n]; `table`: the 256 levels."""
    codes = nested.codes.reshape(-1)
    made = table[codes.int()]
    return made * nested.scales.repeat_interleave(NESTED)[: len(codes)] + nested.offset


@lru_cache(maxsize=1)
def dynamic_map() -> Tensor:
    """The 256 levels of 8-bit scales, ascending (8-bit Approximations for Parallelism in Deep
    Learning, arXiv 1511.04561): a sign, a run of zeros for the power of ten, a linear fraction.
    """
    levels = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        means = 10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(levels), dtype=torch.float32)


def int8(matrix: Tensor) -> Rounded:
    """[rows, columns] -> codes -127 .. 127 in int8 and each row's largest magnitude, float32
    [rows], computed in half precision.
    """
    half = matrix.half()
    most = half.abs().amax(1).float()
    scaled = half * (127.0 / most[:, None])
    return Rounded(scaled.round_().to(torch.int8), most)


def from_int8(codes: Tensor, most: Tensor) -> Tensor:
    """The inverse: float32 [rows, columns]."""
    return codes.float().mul_(most.float()[:, None]).mul_(7.874015718698502e-3)


def _mean(scales: Tensor) -> Tensor:
    """Of few values as torch adds them up; of many in an order that no thread decides."""
    if scales.is_meta or len(scales) <= _PARALLEL:
        return scales.mean()
    made = np.float32(scales.cpu().numpy().mean(dtype=np.float64))
    return torch.tensor(made, device=scales.device)


@lru_cache(maxsize=1)
def _lookup() -> Tensor:
    """uint8 [65536]: a value between -1 and 1 in steps -> the code of the nearest level."""
    levels = dynamic_map()
    steps = torch.arange(_STEPS + 1, dtype=torch.float32) / _STEPS * 2 - 1
    return torch.bucketize(steps, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
