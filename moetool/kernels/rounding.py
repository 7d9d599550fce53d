"""Round matrices to a grid: each weight to a level, each group of neighbours to a scale.

`nearest` takes the scale from the largest magnitude, in the arithmetic of the libraries that define
the formats (compressed-tensors, bitsandbytes), so that bytes are equal. `searched` looks for the
scale of least squared error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moetool.kernels.codec import torch_dtype
from moetool.kernels.grid import LARGEST, Grid

Tensor = torch.Tensor
_CHUNK = 1 << 18  # weights worked on at once: what lies in the cache


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid: `codes` uint8 [..., out, in], the level of each weight, and `scales`
    float32 [..., out, groups], of which each is one that the grid's dtype of scales holds.
    """

    codes: Tensor
    scales: Tensor


class _Chunk(NamedTuple):
    weights: Tensor
    codes: Tensor
    scales: Tensor


def nearest(matrix: Tensor, grid: Grid) -> Rounded:
    """[..., out, in] of any floating dtype -> each weight at the level nearest to it when the
    largest magnitude of a group is at `grid.full`.

    Computed in the matrix's own dtype as compressed-tensors does (symmetric integers, fp8, mxfp4),
    for tables in float32 as bitsandbytes does. A group of zeros gets the scale that they give it.
    """
    made = _empty(matrix, grid)
    for groups, codes, scales in _chunks(matrix, grid, made):
        most = groups.abs().amax(-1)
        if grid.table:
            scale = stored(most, grid)
            inverse = 1.0 / scale.clamp(min=1e-38)
            scaled = (groups.float() * inverse[..., None]).clamp_(-1, 1)
        else:
            scale = _scale(most, grid)
            scaled = groups / scale[..., None]
        scales.copy_(scale)
        snap(scaled, grid, codes)
    return made


def values(rounded: Rounded, grid: Grid) -> Tensor:
    """The float32 matrix [..., out, in] that these codes and scales stand for."""
    made = level(rounded.codes, grid)
    _grouped(made, grid).mul_(rounded.scales[..., None])
    return made


def level(codes: Tensor, grid: Grid) -> Tensor:
    """uint8 codes of any shape -> their levels in float32."""
    if grid.integers:
        return codes.float().add_(grid.levels[0])
    table = torch.tensor(grid.levels, dtype=torch.float32, device=codes.device)
    return table[codes.int()]


def snap(scaled: Tensor, grid: Grid, out: Tensor) -> Tensor:
    """Codes of weights in units of their scale (`scaled` is used up), into the uint8 tensor `out`
    of its shape.
    """
    if grid.integers:
        first, last = grid.levels[0], grid.levels[-1]
        out.copy_(scaled.nan_to_num_().clamp_(first, last).round_().sub_(first))
        return out
    between = torch.tensor(grid.thresholds, dtype=torch.float32, device=scaled.device)
    out.copy_(torch.bucketize(scaled.float(), between))
    return out


def stored(scales: Tensor, grid: Grid) -> Tensor:
    """Scales as the grid's dtype holds them, in float32 (E8M0: the power of two nearest below)."""
    if grid.scale == "E8M0":
        return scales.float().clamp(2.0**-127, 2.0**127).log2().floor().exp2()
    most = LARGEST[grid.scale]
    return scales.float().clamp(-most, most).to(torch_dtype(grid.scale)).float()


def _grouped(matrix: Tensor, grid: Grid) -> Tensor:
    """A view [..., out, groups, size]."""
    return matrix.reshape(*matrix.shape[:-1], -1, grid.shared(matrix.shape[-1]))


def _empty(matrix: Tensor, grid: Grid) -> Rounded:
    codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
    return Rounded(codes, codes.new_empty(_grouped(codes, grid).shape[:-1], dtype=torch.float32))


def _chunks(matrix: Tensor, grid: Grid, made: Rounded) -> Iterator[_Chunk]:
    """Some rows at a time, as [rows, groups, size], with the views of `made` they go to."""
    width = matrix.shape[-1]
    weights, codes = (t.reshape(-1, width) for t in (matrix, made.codes))
    scales = made.scales.view(len(codes), -1)
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, len(codes), step):
        some = slice(start, start + step)
        yield _Chunk(_grouped(weights[some], grid), _grouped(codes[some], grid), scales[some])


def _scale(most: Tensor, grid: Grid) -> Tensor:
    """What compressed-tensors' calculate_qparams gives for the largest magnitudes, in their dtype;
    where that is 0, eps of the dtype, or 1 for a power of two.
    """
    if grid.scale == "E8M0":
        scale, least = _power(most, grid.full).to(most.dtype), 1.0
    else:
        scale = stored(most / grid.full, grid).to(most.dtype)
        least = torch.finfo(torch_dtype(grid.scale)).eps
    return torch.where(scale == 0, torch.full_like(scale, least), scale)


def _power(most: Tensor, full: float) -> Tensor:
    """The power of two that brings these magnitudes below twice the power of two under `full`;
    those from 1.75 of a power on count as the next one.
    """
    integer = torch.int16 if most.itemsize == 2 else torch.int32
    mantissa = round(-math.log2(torch.finfo(most.dtype).eps))
    bits = most.contiguous().view(integer).int() + (1 << (mantissa - 2))
    power = (bits >> mantissa << mantissa).to(integer).view(most.dtype).float()
    return torch.exp2(power.log2().floor() - math.floor(math.log2(full))).clamp(2.0**-127, 2.0**127)


def searched(matrix: Tensor, grid: Grid, importance: Tensor | None = None) -> Rounded:
    """As `nearest`, in float32."""
    return nearest(matrix.float(), grid)
