"""Round matrices to a grid: each weight to a level, each group of neighbours to a scale.

`nearest` takes the scale from the largest magnitude, in the arithmetic of the libraries that define
the formats (compressed-tensors, bitsandbytes), so that bytes are equal. `searched` looks for the
scale of least squared error. Both work on chunks that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moetool.kernels import cells
from moetool.kernels.codec import torch_dtype
from moetool.kernels.grid import E2M1, LARGEST, LEAST, Grid

Tensor = torch.Tensor
_CHUNK = 1 << 20  # weights whose scales are worked on at once
_TILE = 1 << 17  # weights worked on at once
_E4M3 = 254  # levels of fp8, both zeros
_LOW = 12582912.0
_FEW = 32  # levels that are looked up by cells


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid: `codes` uint8 [..., out, in], the level of each weight, and `scales`
    float32 [..., out, groups], of which each is one that the grid's dtype of scales holds.
    """

    codes: Tensor
    scales: Tensor


class _Chunk(NamedTuple):
    """Weights [rows, groups, size], and the views that their codes and scales go to."""

    weights: Tensor
    codes: Tensor
    scales: Tensor


class _Starts(NamedTuple):
    """Where the search of a scale begins: exp(centre) * largest^power * rms^(1 - power), times exp
    of each of `long`, with the largest weight at the end of the grid that reaches farther, and of
    each of `short`, at the other end.
    """

    power: float
    centre: float
    long: tuple[float, ...]
    short: tuple[float, ...] = ()


# By bits. Fitted to normal, Laplace, Student-t and uniform groups of 32 to 256 weights and to those
# of a trained model. What 60 starts would still gain is 0.2 % of the squared error at 2 bits, 0.5 %
# at 3 and 4 bits in groups of 128, 1.3 % in groups of 32; a start costs 0.7 ns a weight.
_INTEGERS = {
    2: _Starts(0.494, -0.432, (-0.16, -0.02, 0.12), (-0.12, 0.02)),
    3: _Starts(0.647, -1.184, (-0.09, -0.01, 0.06, 0.14), (0.0,)),
    4: _Starts(0.85, -2.0, (-0.1, -0.045, 0.0, 0.045, 0.1)),
    5: _Starts(0.95, -2.74, (-0.05, -0.025, 0.0, 0.025, 0.055)),
    6: _Starts(0.984, -3.445, (-0.02, -0.01, 0.0, 0.02, 0.045)),
    7: _Starts(1.0, -4.159, (-0.01, -0.005, 0.0, 0.01, 0.0225)),
    8: _Starts(1.0, -4.852, (-0.005, 0.0, 0.0075, 0.0125, 0.02)),
}


def nearest(matrix: Tensor, grid: Grid) -> Rounded:
    """[..., out, in] of any floating dtype -> each weight at the level nearest to it when the
    largest magnitude of a group is at `grid.full`.

    Computed in the matrix's own dtype as compressed-tensors does (symmetric integers, fp8, mxfp4),
    for tables in float32 as bitsandbytes does. A group of zeros gets the scale that they give it.
    """
    made = _empty(matrix, grid)
    if matrix.is_meta:
        return made
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


def searched(matrix: Tensor, grid: Grid, importance: Tensor | None = None) -> Rounded:
    """[..., out, in] -> weights on the grid with scales of least squared error, found in float32.

    From some starts for each group (shrunk scales, of both signs where `grid.signed`: of -8 .. 7
    the end with the extra level goes where the largest weight lies), the weights are rounded, the
    scale is solved for these levels, rounded to what is stored, and the best kept. importance [in]
    or [experts, in]: weights of the squared errors, as the diagonal of a Hessian.
    """
    made, starts = _empty(matrix, grid), _starts(grid)
    if matrix.is_meta:
        return made
    if importance is None or importance.dim() == 1:
        pieces = [_Piece(matrix, made, importance)]
    else:
        stacks = zip(matrix, made.codes, made.scales, importance, strict=True)
        pieces = [_Piece(m, Rounded(c, s), i) for m, c, s, i in stacks]
    tries = len(starts.long) + len(starts.short)
    room = torch.empty(3, max(_TILE, tries * matrix.shape[-1]), device=matrix.device)
    for piece in pieces:
        root = None if piece.importance is None else piece.importance.float().sqrt()
        for chunk in _chunks(piece.matrix, grid, piece.made):
            search = _Search(chunk, grid, root, room)
            search.finish(_exact(chunk, grid, search.best(search.starts(starts))))
    return made


def _exact(chunk: _Chunk, grid: Grid, found: Tensor) -> Tensor:
    """Scales [rows, groups]: of groups of ternary weights (zeros, and one magnitude that the grid
    holds as a scale) that magnitude, with which nothing is rounded; else those that were `found`.
    """
    if not {-1.0, 1.0}.issubset(grid.levels) or not _is_ternary(chunk.weights[:1]).all():
        return found
    most = chunk.weights.abs().amax(-1).float()
    same = _is_ternary(chunk.weights) & (stored(most, grid) == most)
    return torch.where(same, most, found)


def _is_ternary(groups: Tensor) -> Tensor:
    """Which groups [..., size] hold nothing but zeros and one magnitude."""
    sizes = groups.abs()
    return ((sizes == 0) | (sizes == sizes.amax(-1, keepdim=True))).all(-1)


class _Piece(NamedTuple):
    matrix: Tensor
    made: Rounded
    importance: Tensor | None


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
    of its shape. NaN is some level.
    """
    scaled = scaled.float()
    if grid.integers:
        first, last = grid.levels[0], grid.levels[-1]
        # 1.5 * 2^23 more, the low byte of a float is its integer: faster than to convert it.
        return out.copy_(scaled.round_().clamp_(first, last).add_(_LOW - first).view(torch.int32))
    if len(grid.levels) == _E4M3:
        return out.copy_(fp8_codes(_fp8(scaled, grid)))
    if len(grid.levels) > _FEW:
        between = torch.tensor(grid.thresholds, dtype=torch.float32, device=scaled.device)
        return out.copy_(torch.bucketize(scaled.float(), between))
    return out.copy_(cells.codes(scaled, grid))


def fp8_codes(values: Tensor) -> Tensor:
    """float8_e4m3fn -> codes of `grid.e4m3`."""
    byte = values.view(torch.int8)
    return ((byte & 127) ^ (byte >> 7)).add_(127).view(torch.uint8)


def fp8_values(codes: Tensor) -> Tensor:
    """Codes of `grid.e4m3` -> float8_e4m3fn: the inverse of `fp8_codes`."""
    steps = (codes - 127).view(torch.int8)
    return ((steps ^ (steps >> 7)) | (steps & -128)).view(torch.float8_e4m3fn)


def stored(scales: Tensor, grid: Grid) -> Tensor:
    """Scales as the grid's dtype holds them, in float32 (E8M0: the power of two nearest to it)."""
    if grid.scale == "E8M0":
        exponent = (scales.float().clamp(min=LEAST["E8M0"]) / 0.75).log2().floor()
        return exponent.exp2().clamp(max=LARGEST["E8M0"])
    most = LARGEST[grid.scale]
    return scales.float().clamp(-most, most).to(torch_dtype(grid.scale)).float()


def _fp8(scaled: Tensor, grid: Grid) -> Tensor:
    first, last = grid.levels[0], grid.levels[-1]
    scaled = scaled.add_(0.0)  # so that -0.0 is not what a small negative weight is
    return scaled.clamp_(first, last).nan_to_num_().to(torch.float8_e4m3fn)


def _grouped(matrix: Tensor, grid: Grid) -> Tensor:
    """A view [..., out, groups, size]."""
    return matrix.reshape(*matrix.shape[:-1], -1, grid.shared(matrix.shape[-1]))


def _empty(matrix: Tensor, grid: Grid) -> Rounded:
    codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
    return Rounded(codes, codes.new_empty(_grouped(codes, grid).shape[:-1], dtype=torch.float32))


def _chunks(matrix: Tensor, grid: Grid, made: Rounded) -> Iterator[_Chunk]:
    """Some rows at a time."""
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
        scale = _power(most, grid.full).to(most.dtype)
    else:
        scale = stored(most / grid.full, grid).to(most.dtype)
    return torch.where(scale == 0, torch.full_like(scale, _of_zeros(grid)), scale)


def _of_zeros(grid: Grid) -> float:
    return 1.0 if grid.scale == "E8M0" else torch.finfo(torch_dtype(grid.scale)).eps


def _power(most: Tensor, full: float) -> Tensor:
    """The power of two that brings these magnitudes below twice the power of two under `full`;
    those from 1.75 of a power on count as the next one.
    """
    integer = torch.int16 if most.itemsize == 2 else torch.int32
    mantissa = round(-math.log2(torch.finfo(most.dtype).eps))
    bits = most.contiguous().view(integer).int() + (1 << (mantissa - 2))
    power = (bits >> mantissa << mantissa).to(integer).view(most.dtype).float()
    exponent = power.log2().floor() - math.floor(math.log2(full))
    return torch.exp2(exponent).clamp(LEAST["E8M0"], LARGEST["E8M0"])


def _starts(grid: Grid) -> _Starts:
    bits = math.log2(len(grid.levels))
    if grid.integers and bits in _INTEGERS:
        starts = _INTEGERS[int(bits)]
        return starts if grid.signed else _even(starts, min(starts.long), max(starts.long) + 0.07)
    centre = -math.log(grid.full)
    if grid.scale == "E8M0":
        return _Starts(1.0, centre, (0.0, math.log(2)))
    return _Starts(1.0, centre, (0.0, -0.05) if len(grid.levels) == _E4M3 else (0.0, -0.1))


def _even(starts: _Starts, low: float, high: float, count: int = 8) -> _Starts:
    steps = (low + i * (high - low) / (count - 1) for i in range(count))
    return starts._replace(long=tuple(steps), short=())


class _Search:
    """The scales of some rows, looked for. What is one number a group is worked out for all rows at
    once, weights in tiles that stay in the cache; `room` is two buffers for them.
    """

    def __init__(self, chunk: _Chunk, grid: Grid, root: Tensor | None, room: Tensor) -> None:
        self.chunk, self.grid, self.room = chunk, grid, room
        self.root = None if root is None else root.reshape(chunk.weights.shape[1:])

    def tiles(self, tries: int) -> Iterator[_Tile]:
        """Some rows at a time, as many as fit into the cache with one result a scale."""
        step = max(1, _TILE // (tries * self.chunk.weights[0].numel()))
        for start in range(0, len(self.chunk.weights), step):
            rows = slice(start, start + step)
            weights = self.chunk.weights[rows]
            flat = (
                r[: n * weights.numel()] for r, n in zip(self.room, (1, tries, tries), strict=True)
            )
            views = [r.view(-1, *weights.shape) for r in flat]
            yield _Tile(rows, views[0][0].copy_(weights), views[1], views[2])

    def starts(self, starts: _Starts) -> Tensor:
        """Scales to begin with [starts, rows, groups]."""
        high, low, size = self.chunk.scales.new_empty(3, *self.chunk.scales.shape)
        for rows, weights, _, _ in self.tiles(1):
            torch.amax(weights, -1, out=high[rows])
            torch.amin(weights, -1, out=low[rows])
            torch.linalg.vector_norm(weights, dim=-1, out=size[rows])
        least, count = LEAST[self.grid.scale], math.sqrt(self.chunk.weights.shape[-1])
        most = torch.maximum(high, -low).clamp_(least, LARGEST[self.grid.scale] / 4)
        share = size.div_(most * count).clamp_(max=1)  # where squares overflow
        centre, factor = share.pow_(1 - starts.power).mul_(most), math.exp(starts.centre)
        if self.grid.scale == "E8M0":
            centre, factor = centre.mul_(factor).log2_().floor_().exp2_(), 1.0
        if self.grid.signed:
            far_below = -self.grid.levels[0] >= self.grid.levels[-1]
            centre = centre.copysign(high.add_(low).mul_(-1.0 if far_below else 1.0))
        other = -factor if self.grid.signed else factor
        ends = [factor * math.exp(v) for v in starts.long]
        ends += [other * math.exp(v) for v in starts.short]
        tries = stored(centre * centre.new_tensor(ends)[:, None, None], self.grid)
        return torch.where(tries.abs() >= least, tries, torch.full_like(tries, least))

    def best(self, tries: Tensor) -> Tensor:
        """Of scales [tries, rows, groups], each solved for the levels that weights get with it, the
        one that leaves the least squared error [rows, groups].
        """
        both, power, inverse = torch.empty_like(tries), torch.empty_like(tries), tries.reciprocal()
        for rows, weights, scaled, work in self.tiles(len(tries)):
            levels = _snapped(torch.mul(weights, inverse[:, rows, :, None], out=scaled), self.grid)
            if self.root is not None:
                levels.mul_(self.root)
                weights.mul_(self.root)
            torch.sum(torch.mul(levels, weights, out=work), -1, out=both[:, rows])
            torch.linalg.vector_norm(levels, dim=-1, out=power[:, rows])
        power.square_().clamp_(min=1e-30)
        made = stored(both / power, self.grid)
        # How much of the squared weights is not in the error.
        gain = (both * 2).sub_(power.mul_(made)).mul_(made)
        found, most = _usable(made[0], tries[0], self.grid), gain[0]
        for scale, start, more in zip(made[1:], tries[1:], gain[1:], strict=True):
            better = more > most
            found = torch.where(better, _usable(scale, start, self.grid), found)
            most = torch.where(better, more, most)
        return found

    def finish(self, scale: Tensor) -> None:
        """Keep these scales, and the codes that weights get with them."""
        nothing = scale.abs() <= LEAST[self.grid.scale]
        scale = torch.where(nothing, torch.full_like(scale, _of_zeros(self.grid)), scale)
        self.chunk.scales.copy_(scale)
        inverse = scale.reciprocal()[..., None]
        for rows, weights, _, _ in self.tiles(1):
            snap(weights.mul_(inverse[rows]), self.grid, self.chunk.codes[rows])


class _Tile(NamedTuple):
    """Rows, their weights in float32 [rows, groups, size], and room [tries, rows, groups, size]."""

    rows: slice
    weights: Tensor
    levels: Tensor
    work: Tensor


def _usable(scale: Tensor, instead: Tensor, grid: Grid) -> Tensor:
    good = (scale.abs() >= LEAST[grid.scale]) & scale.isfinite()
    return torch.where(good, scale, instead)


def _snapped(scaled: Tensor, grid: Grid) -> Tensor:
    """The levels nearest to `scaled`, in its place."""
    if grid.integers:
        return scaled.round_().clamp_(grid.levels[0], grid.levels[-1])
    if len(grid.levels) == _E4M3:
        scaled.clamp_(grid.levels[0], grid.levels[-1])
        return scaled.copy_(scaled.to(torch.float8_e4m3fn))
    if grid.levels == E2M1:  # steps are half the power of two below, at least a half
        steps = scaled.clamp_(-6, 6).view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
        steps.mul_(0.5).clamp_(min=0.5)
        return scaled.div_(steps).round_().mul_(steps)
    return scaled.copy_(
        level(snap(scaled, grid, torch.empty_like(scaled, dtype=torch.uint8)), grid)
    )
