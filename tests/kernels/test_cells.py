"""Levels found by cells are those that a search finds."""

from __future__ import annotations

import pytest
import torch

from moetool.kernels import cells
from moetool.kernels import grid as grids
from moetool.kernels.grid import Grid


@pytest.mark.parametrize(
    "grid", [grids.nf4(64), grids.fp4(64), grids.e2m1(32, "E8M0")], ids=["nf4", "fp4", "mxfp4"]
)
def test_as_a_search(grid: Grid) -> None:
    """Thresholds themselves, their neighbours among float32, zeros, values beyond both ends."""
    thresholds = torch.tensor(grid.thresholds)
    near = [torch.nextafter(thresholds, torch.tensor(end)) for end in (-9e9, 9e9)]
    torch.manual_seed(0)
    spread = torch.rand(100_000) * 20 - 10
    values = torch.cat([thresholds, *near, spread, torch.tensor([0.0, -0.0, -9e9, 9e9])])
    for dimmed in (values, values / 16):
        wanted = torch.bucketize(dimmed, thresholds)
        assert torch.equal(cells.codes(dimmed, grid).long(), wanted)
    assert cells.codes(torch.tensor([[float("nan")]]), grid).shape == (1, 1)
