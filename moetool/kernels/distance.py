"""How far a rounded matrix is from what it was rounded from: squared errors, and the weights that
are not at the level nearest to them.

The answer of a reader, not of a rounder: nothing here is shared with kernels/rounding.py but what a
code and a scale stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from moetool.kernels.grid import Grid
from moetool.kernels.rounding import Rounded

Tensor = torch.Tensor
_CHUNK = 1 << 16  # weights worked on at once: what lies in the cache
_FLOAT32 = 1e-5  # relative rounding of a few float32 operations
_NOTHING = 1e-37  # scales whose inverse is not finite, or nearly
_SMALLEST, _LARGEST = 1e-20, 1e38  # sums of squares that float32 tells well
_TOLERATED = 1.1  # stored scales are rounded


class Distance(NamedTuple):
    """Sums over a matrix. error: squared differences; norm: squared weights; astray: weights for
    which another level is nearer.
    """

    error: float
    norm: float
    astray: int = 0

    @property
    def relative(self) -> float:
        """Frobenius norm of the difference by that of the matrix; 0 for two matrices of zeros."""
        if self.error == 0:
            return 0.0
        return float("inf") if self.norm == 0 else float((self.error / self.norm) ** 0.5)


def of_values(matrix: Tensor, made: Tensor) -> Distance:
    """Two matrices of one shape, of any floating dtypes."""
    error = norm = 0.0
    for some in _rows(matrix):
        weights = matrix[some].float()
        error += _squared(weights - made[some])
        norm += _squared(weights)
    return Distance(error, norm)


def of_codes(matrix: Tensor, rounded: Rounded, grid: Grid, rounding: float = 0.0) -> Distance:
    """A matrix [out, in] and its codes and scales. rounding: relative error of the arithmetic in
    which it was divided by its scales (that of bfloat16, where it was rounded in its own dtype).
    """
    scales = rounded.scales
    lost = scales.abs() <= _NOTHING  # such a scale makes zeros of its group
    inverse = scales.reciprocal().masked_fill_(lost, 0.0)
    around = _Around(grid, rounding + _FLOAT32, matrix.device)
    room = torch.empty(2, *matrix[: _step(matrix)].shape, device=matrix.device)
    error, norm, astray = 0.0, 0.0, 0
    for some in _rows(matrix):
        weights, apart = room[:, : len(matrix[some])]
        weights.copy_(matrix[some])
        norm += _squared(weights)
        scaled = weights.view(*scales[some].shape, -1).mul_(inverse[some, :, None])
        apart = _levels(rounded.codes[some], grid, apart).view(scaled.shape).sub_(scaled)
        error += _squared(torch.linalg.vector_norm(apart, dim=-1), scales[some])
        astray += around.astray(apart, scaled, rounded.codes[some])
    if bool(lost.any()):
        groups = matrix.view(*scales.shape, -1)
        error += sum(_squared(g.float()) for g in groups[lost])
    return Distance(error, norm, astray)


def most(matrix: Tensor, grid: Grid) -> float:
    """The largest relative error that rounding to the nearest level explains: every weight of a
    group half the widest gap away, under the scale of the group's largest magnitude.
    """
    half = half_gap(grid)
    error = norm = 0.0
    for some in _rows(matrix):
        groups = matrix[some].float().view(-1, grid.shared(matrix.shape[-1]))
        norm += _squared(groups)
        error += _squared(groups.abs().amax(-1).mul_(half / grid.full)) * groups.shape[-1]
    return _TOLERATED * Distance(error, norm).relative


def half_gap(grid: Grid) -> float:
    """Half the widest gap between levels, in units of the scale of the largest magnitude."""
    levels = sorted(set(grid.levels))
    half = max(b - a for a, b in pairwise(levels)) / 2
    return half * (2 if grid.scale == "E8M0" else 1)  # the next power of two, or what lies beyond


class _Around:
    """Half the gap on both sides of each level; beyond the last ones everything is theirs."""

    def __init__(self, grid: Grid, rounding: float, device: torch.device) -> None:
        self.grid, self.rounding = grid, rounding
        self.tables: tuple[Tensor, ...] = ()
        if not grid.integers:
            self.tables = tuple(torch.tensor(t, device=device) for t in _gaps(grid.levels))

    def astray(self, apart: Tensor, scaled: Tensor, codes: Tensor) -> int:
        """How many weights are farther from their level than half a gap; NaN is. Both tensors are
        used up.
        """
        if self.tables:
            slack = scaled.abs_().mul_(self.rounding).add_(_FLOAT32 * abs(self.grid.levels[0]))
            flat = codes.reshape(-1).int()  # index_select is three times as fast as indexing
            below, above = (
                t.index_select(0, flat).view(apart.shape).add_(slack) for t in self.tables
            )
            return _count((apart <= below) & (apart >= above.neg_()))
        # Beyond the last levels: what is clipped is at its level.
        first, last = self.grid.levels[0], self.grid.levels[-1]
        apart.add_(scaled).sub_(scaled.clamp_(first, last)).abs_()
        if bool(apart.amax() <= 0.5 + self.rounding):
            return 0
        return _count(apart <= scaled.abs_().mul_(self.rounding).add_(0.5 + _FLOAT32))


def _gaps(levels: tuple[float, ...]) -> tuple[list[float], list[float]]:
    """Half the gap below and above each level; infinite at the ends."""
    below = [(v - max((x for x in levels if x < v), default=-torch.inf)) / 2 for v in levels]
    above = [(min((x for x in levels if x > v), default=torch.inf) - v) / 2 for v in levels]
    return below, above


def _levels(codes: Tensor, grid: Grid, out: Tensor) -> Tensor:
    """What codes stand for, in units of their scale."""
    if grid.integers:
        return out.copy_(codes).add_(grid.levels[0])
    table = torch.tensor(grid.levels, dtype=torch.float32, device=codes.device)
    return torch.index_select(table, 0, codes.reshape(-1).int()).view(out.shape)


def _count(good: Tensor) -> int:
    return int(good.numel() - good.sum())


def _step(matrix: Tensor) -> int:
    """Rows that are worked on at once."""
    return max(1, _CHUNK // max(1, matrix[:1].numel()))


def _rows(matrix: Tensor) -> Iterator[slice]:
    step = _step(matrix)
    return (slice(i, i + step) for i in range(0, len(matrix), step))


def _squared(values: Tensor, by: Tensor | None = None) -> float:
    """The sum of squares (of products with `by`), in float64 where float32 over- or underflows."""
    flat = (values if by is None else values * by).reshape(-1)
    found = float(torch.dot(flat, flat))
    if _SMALLEST < found < _LARGEST:
        return found
    wide = (values.double() if by is None else values.double() * by).reshape(-1)
    return float(torch.dot(wide, wide))
