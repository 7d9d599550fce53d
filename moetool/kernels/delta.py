"""What changed between two matrices, kept at a few places, or in a few bits (DeRS, arXiv
2503.01359).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moetool.kernels import draw, rounding
from moetool.kernels.grid import Grid
from moetool.kernels.rounding import Rounded

Tensor = torch.Tensor


class Sparse(NamedTuple):
    """A matrix of few numbers, row by row: those of row r are `values[rows[r] : rows[r + 1]]`, in
    the columns of the same places. `rows` int32 [out + 1], `columns` int32 [count].
    """

    rows: Tensor
    columns: Tensor
    values: Tensor


def largest(change: Tensor, count: int) -> Sparse:
    """The `count` largest magnitudes of [out, in]; of equal ones the first."""
    if change.is_meta:
        return _blank(change, count)
    flat = change.abs().flatten()
    least = flat.kthvalue(flat.numel() - count + 1).values
    above = flat > least
    ties = (flat == least).nonzero().flatten()[: count - int(above.sum())]
    above[ties] = True
    return _at(change, above.nonzero().flatten())


def drawn(change: Tensor, count: int, seed: int, name: str) -> Sparse:
    """`count` places of [out, in] at random, their numbers times what makes up for the others."""
    if change.is_meta:
        return _blank(change, count)
    found = _at(change, torch.from_numpy(draw.places(change.numel(), count, seed, name)))
    return found._replace(values=found.values * (change.numel() / count))


def somewhere(shape: tuple[int, int], count: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Rows and columns, as `Sparse` has them, of `count` places at random in [out, in]."""
    out, width = shape
    return _lines(torch.from_numpy(draw.places(out * width, count, seed, name)), out, width)


def flat(sparse: Sparse, width: int) -> Tensor:
    """Where each number lies in the matrix laid out row by row, int64 [count]."""
    return owners(sparse) * width + sparse.columns


def owners(sparse: Sparse) -> Tensor:
    """The row of each number, int64 [count]."""
    rows = torch.arange(len(sparse.rows) - 1, device=sparse.rows.device)
    counts = sparse.rows.diff().long()
    return rows.repeat_interleave(counts, output_size=len(sparse.values))


def spread(sparse: Sparse, width: int) -> Tensor:
    """The matrix [out, width], in the dtype of the numbers."""
    empty = sparse.values.new_zeros((len(sparse.rows) - 1) * width)
    return empty.index_copy(0, flat(sparse, width), sparse.values).view(-1, width)


def coded(change: Tensor, grid: Grid) -> Rounded:
    """[out, in] -> codes and scales of least squared error. Of one bit, the signs times the mean
    magnitude of each group: that is the best.
    """
    if len(grid.levels) > 2 or change.is_meta:
        return rounding.searched(change, grid)
    size = grid.shared(change.shape[-1])
    scales = change.float().view(len(change), -1, size).abs().mean(-1)
    return Rounded((change > 0).to(torch.uint8), rounding.stored(scales, grid))


def _at(change: Tensor, places: Tensor) -> Sparse:
    """The numbers at ascending places of the matrix laid out row by row."""
    return Sparse(*_lines(places, *change.shape), change.flatten()[places])


def _lines(places: Tensor, out: int, width: int) -> tuple[Tensor, Tensor]:
    """Where each row begins, and the columns, of ascending places."""
    owner = places // width
    rows = torch.zeros(out + 1, dtype=torch.int32, device=places.device)
    rows[1:] = torch.bincount(owner, minlength=out).cumsum(0)
    return rows, (places - owner * width).int()


def _blank(change: Tensor, count: int) -> Sparse:
    """As much of it as a rehearsal needs."""
    whole = change.new_empty(count, dtype=torch.int32)
    rows = change.new_empty(len(change) + 1, dtype=torch.int32)
    return Sparse(rows, whole, change.new_empty(count))


def apart(change: Tensor, held: Tensor) -> float:
    """The error of what is held of a change, relative (Frobenius); 0 where there is no change."""
    return float((change - held).norm() / change.norm().clamp(min=1e-38))
