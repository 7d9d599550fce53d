"""How far a rounded matrix is from its source, against float64."""

from __future__ import annotations

import pytest
import torch

from moetool.kernels import distance, grid, rounding
from moetool.kernels.grid import Grid
from moetool.kernels.rounding import Rounded

GRIDS = {
    "int4/32": grid.integers(4, 32, "BF16"),
    "int8": grid.integers(8, 0, "BF16"),
    "int2/64": grid.integers(2, 64, "BF16"),
    "fp8": grid.e4m3(0, "BF16"),
    "mxfp4": grid.e2m1(32, "E8M0"),
    "nf4": grid.nf4(64),
    "fp4": grid.fp4(64),
}


def matrix(rows: int = 37, columns: int = 192, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    made[1] *= 1e3
    made[2, 5] = 40.0
    made[3] = 0.0
    return made.to(dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distance_is_that_of_the_values(name: str, dtype: torch.dtype) -> None:
    """Both ways of looking give the error that float64 gives, and every weight is in its place."""
    on: Grid = GRIDS[name]
    weights = matrix(dtype=dtype)
    made = rounding.nearest(weights, on)
    values = rounding.values(made, on)
    rough = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    by_codes = distance.of_codes(weights, made, on, rough)
    by_values = distance.of_values(weights, values)
    assert by_codes.astray == 0
    wanted = relative(weights, values)
    assert by_values.relative == pytest.approx(wanted, rel=1e-4)
    assert by_codes.relative == pytest.approx(wanted, rel=1e-3)
    assert wanted <= distance.most(weights, on)
    assert distance.most(weights, on) < 40 * wanted


@pytest.mark.parametrize("name", GRIDS)
def test_one_code_that_is_another(name: str) -> None:
    on = GRIDS[name]
    weights = matrix()
    made = rounding.nearest(weights, on)
    for row, column in ((0, 0), (5, 100), (36, 191)):
        codes = made.codes.clone()
        near = int(codes[row, column])
        codes[row, column] = near + 2 if near + 2 < len(on.levels) else near - 2
        assert distance.of_codes(weights, Rounded(codes, made.scales), on).astray == 1


def test_what_is_clipped_is_in_its_place() -> None:
    on = GRIDS["int4/32"]
    weights = matrix()
    scales = rounding.nearest(weights, on).scales * 0.5  # half of each group's reach
    scaled = weights.view(37, 6, 32) / scales[..., None]
    codes = (scaled.round().clamp(-8, 7) + 8).to(torch.uint8).view(weights.shape)
    assert int(((scaled > 7.5) | (scaled < -8.5)).sum()) > 100
    found = distance.of_codes(weights, Rounded(codes, scales), on)
    assert found.astray == 0
    wanted = relative(weights, rounding.values(Rounded(codes, scales), on))
    assert found.relative == pytest.approx(wanted, rel=1e-3)


def test_nothing_and_no_numbers() -> None:
    on = GRIDS["int4/32"]
    zeros = torch.zeros(4, 64)
    assert distance.of_codes(zeros, rounding.nearest(zeros, on), on) == (0.0, 0.0, 0)
    assert distance.of_values(zeros, zeros).relative == 0.0
    assert distance.of_values(zeros, zeros + 1).relative == float("inf")
    lost = Rounded(torch.full((4, 64), 8, dtype=torch.uint8), torch.zeros(4, 2))
    found = distance.of_codes(zeros + 2, lost, on)
    assert found.relative == pytest.approx(1.0)
    weights = matrix()
    weights[0, 0] = float("nan")
    assert distance.of_codes(weights, rounding.nearest(weights, on), on).astray >= 1
    broken = distance.of_values(weights, weights).relative
    assert broken != broken


@pytest.mark.parametrize("size", [3e38, 1e-30])
def test_squares_that_float32_does_not_hold(size: float) -> None:
    weights = (matrix() / matrix().abs().max()).double() * size
    on = grid.integers(4, 64, "F32")
    rounded = rounding.nearest(weights.float(), on)
    made = rounding.values(rounded, on)
    true = relative(weights, made)
    for found in (
        distance.of_codes(weights.float(), rounded, on),
        distance.of_values(weights.float(), made),
    ):
        assert found.astray == 0
        assert found.relative == pytest.approx(true, rel=1e-3)
    assert true < distance.most(weights.float(), on) < 1
