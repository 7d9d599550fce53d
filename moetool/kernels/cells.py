"""Find the level of each weight in a table of few levels: the range is cut into equal cells, each
with one threshold at most, so that a look-up and one comparison do what a search does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from moetool.kernels.grid import Grid

Tensor = torch.Tensor
_MOST = 1 << 12  # cells that still lie in the cache


@dataclass(frozen=True)
class _Cells:
    """`lower` uint8 [cells]: thresholds below a cell. `inside` float32 [cells]: the one in it, inf
    for none. A weight's cell is the whole part of (weight - first) * scale.
    """

    first: float
    scale: float
    lower: Tensor
    inside: Tensor

    def of(self, weights: Tensor) -> Tensor:
        """int32 numbers of cells. Never falling, so that weights of a lower cell are lower."""
        found = weights.sub(self.first).mul_(self.scale).clamp_(0, len(self.lower) - 1)
        return found.int().clamp_(min=0)  # NaN


def codes(weights: Tensor, grid: Grid) -> Tensor:
    """float32 weights in units of their scale -> uint8 codes of the same shape: how many of the
    grid's thresholds lie below each. NaN is some level.
    """
    cells = _cells(grid, weights.device)
    flat = weights.reshape(-1)
    at = cells.of(flat)
    made = cells.lower.index_select(0, at).add_(flat > cells.inside.index_select(0, at))
    return made.view(weights.shape)


@lru_cache(maxsize=16)
def _cells(grid: Grid, device: torch.device) -> _Cells:
    """As few cells as hold one threshold each."""
    known = torch.tensor(grid.thresholds, dtype=torch.float32)
    first, width, count = grid.levels[0], grid.levels[-1] - grid.levels[0], 16
    alone = False
    while not alone:
        count *= 2
        assert count <= _MOST, "thresholds too near to each other"
        empty = torch.empty(count, dtype=torch.uint8)
        at = _Cells(first, count / width, empty, empty).of(known)
        alone = int(torch.bincount(at).max()) == 1
    inside = torch.full((count,), float("inf"))
    inside[at.long()] = known
    held = torch.bincount(at, minlength=count)
    lower = (held.cumsum(0) - held).to(torch.uint8)
    return _Cells(first, count / width, lower.to(device), inside.to(device))
