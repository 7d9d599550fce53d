"""Rounding to grids: against loops in float64, and against compressed-tensors and bitsandbytes
where they are installed.
"""

from __future__ import annotations

import math

import pytest
import torch

from moetool.kernels import grid as grids
from moetool.kernels import rounding
from moetool.kernels.grid import Grid

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def awkward(dtype: torch.dtype) -> torch.Tensor:
    """[16, 512] with rows of zeros, of tiny and of large weights, and a negative zero."""
    torch.manual_seed(0)
    weights = torch.randn(16, 512) * 0.05
    weights[3] = 0
    weights[4] *= 1e-3
    weights[5, :128] *= 1e3
    weights[6] *= 1e-6
    weights[7, 1] = -0.0
    return weights.to(dtype)


def slowly(value: float, grid: Grid) -> float:
    """The level nearest to a value, one at a time; of two as near, the one of even count from 0."""
    best = min(grid.levels, key=lambda v: abs(v - value))
    near = [v for v in grid.levels if abs(v - value) == abs(best - value)]
    if len(set(near)) == 1 or grid.table:
        return near[0]
    between = {v: len({u for u in grid.levels if min(0, v) < u < max(0, v)}) for v in near}
    return next(v for v in near if v == 0 or between[v] % 2)


FP8 = grids.e4m3(0, "F32")
GRIDS = {
    "int4": grids.integers(4, 32, "F32"),
    "int2-channel": grids.integers(2, 0, "F32"),
    "fp8": FP8,
    "mxfp4": grids.e2m1(32, "E8M0"),
    "nf4": grids.nf4(64),
    "fp4": grids.fp4(64),
}


@pytest.mark.parametrize("name", GRIDS)
def test_each_weight_goes_to_the_nearest_level(name: str) -> None:
    grid, weights = GRIDS[name], awkward(torch.float32)[:5, :64]
    made = rounding.nearest(weights, grid)
    levels = rounding.level(made.codes, grid)
    spread = made.scales.repeat_interleave(grid.shared(64), -1)
    assert torch.equal(rounding.values(made, grid), levels * spread)
    ratio = (weights / spread.clamp(min=1e-38)).flatten().tolist()
    wanted = [slowly(v, grid) for v in ratio]
    assert torch.equal(levels.flatten(), torch.tensor(wanted, dtype=torch.float32))
    if grid.scale != "E8M0":
        most = weights.unflatten(-1, (-1, grid.shared(64))).abs().amax(-1)
        assert torch.equal(made.scales[:3], most[:3] / grid.full)


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_ties_are_even(name: str) -> None:
    grid = GRIDS[name]
    for low, high in zip(grid.levels, grid.levels[1:], strict=False):
        middle = torch.tensor([(low + high) / 2])
        found = rounding.snap(middle, grid, torch.empty(1, dtype=torch.uint8))
        assert grid.levels[int(found)] == slowly((low + high) / 2, grid), (low, high)


@pytest.mark.parametrize("name", GRIDS)
def test_levels_are_the_same_with_and_without_codes(name: str) -> None:
    """The search has a shorter road."""
    grid = GRIDS[name]
    ties = (torch.tensor(grid.levels[1:]) + torch.tensor(grid.levels[:-1])) / 2
    some = torch.cat([ties, torch.linspace(-1.1, 1.1, 999) * grid.full])
    codes = rounding.snap(some.clone(), grid, torch.empty(len(some), dtype=torch.uint8))
    assert torch.equal(rounding._snapped(some.clone(), grid), rounding.level(codes, grid))


def test_a_negative_weight_keeps_the_sign_of_its_zero() -> None:
    for grid in (GRIDS["fp8"], GRIDS["mxfp4"]):
        weights = torch.tensor([[1.0, -1e-5, 1e-5, -0.0]]).repeat(1, 16)
        levels = rounding.level(rounding.nearest(weights, grid).codes, grid)
        assert levels[0, :4].signbit().tolist() == [False, True, False, False]


def test_nothing_is_said_of_nan_but_nothing_breaks() -> None:
    weights = torch.full((2, 64), math.nan)
    for grid in GRIDS.values():
        made = rounding.nearest(weights, grid)
        assert rounding.values(made, grid).shape == weights.shape


def test_levels_of_fp8_are_those_of_torch() -> None:
    codes = torch.tensor([*range(0xFE, 0x7F, -1), *range(0x7F)], dtype=torch.uint8)
    wanted = codes.view(torch.float8_e4m3fn).float()
    levels = torch.tensor(grids.e4m3(0, "F32").levels)
    assert torch.equal(levels, wanted) and torch.equal(levels.signbit(), wanted.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_compressed_tensors(dtype: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    def check(grid: Grid, **words: object) -> None:
        kind = {"strategy": "group", "group_size": grid.group} if grid.group else {}
        args = QuantizationArgs(symmetric=True, **{"strategy": "channel", **kind, **words})
        weights = awkward(DTYPES[dtype])
        groups = weights.unflatten(-1, (-1, grid.shared(512)))
        scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        wanted = quantize(weights, scales, zeros, args).float()
        made = rounding.nearest(weights, grid)
        levels = rounding.level(made.codes, grid)
        assert torch.equal(made.scales, scales.float())
        assert torch.equal(levels, wanted)
        if not grid.integers:
            assert torch.equal(levels.signbit(), wanted.signbit())

    for group in (0, 32, 128):
        for bits in range(2, 9):
            check(grids.integers(bits, group, dtype), num_bits=bits, type="int")
    check(grids.e4m3(0, dtype), num_bits=8, type="float")
    check(grids.e2m1(32, "E8M0"), num_bits=4, type="float", scale_dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_equal_to_bitsandbytes(dtype: str, name: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weights, grid = awkward(DTYPES[dtype]), GRIDS[name]
    packed, state = functional.quantize_4bit(weights, blocksize=64, quant_type=name)
    made = rounding.nearest(weights, grid)
    order = torch.tensor(grids.FP4_CODES if name == "fp4" else range(16), dtype=torch.uint8)
    codes = order[made.codes.int()].flatten()
    assert torch.equal(codes[::2] << 4 | codes[1::2], packed.flatten())
    assert torch.equal(made.scales.flatten(), state.absmax)
    stock = functional.dequantize_4bit(packed, state)
    assert torch.equal(rounding.values(made, grid).to(stock.dtype), stock)


def by_trying(weights: torch.Tensor, grid: Grid, importance: torch.Tensor) -> torch.Tensor:
    """Least squared error of each group [groups], weighted, over 400 scales of each sign."""
    groups = weights.double().reshape(-1, grid.shared(weights.shape[-1]))
    heavy = importance.double().expand_as(weights).reshape(groups.shape)
    best = torch.full((len(groups),), math.inf, dtype=torch.float64)
    for factor in torch.linspace(0.25, 1.25, 400, dtype=torch.float64):
        for sign in (1, -1) if grid.signed else (1,):
            scale = groups.abs().amax(-1, keepdim=True) / grid.full * factor * sign
            scale = rounding.stored(scale, grid).double()
            levels = (groups / scale).round().clamp(grid.levels[0], grid.levels[-1])
            best = torch.minimum(best, ((levels * scale - groups) ** 2 * heavy).sum(-1))
    return best


SOUGHT = {
    "int2": grids.integers(2, 64, "BF16"),
    "int3": grids.integers(3, 128, "BF16"),
    "int4": grids.integers(4, 128, "BF16"),
    "int4-positive": grids.integers(4, 32, "F16", signed=False),
    "int8": grids.integers(8, 0, "F32"),
}


@pytest.mark.parametrize("name", SOUGHT)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_is_nearly_exhaustive(name: str, weighted: bool) -> None:
    grid = SOUGHT[name]
    torch.manual_seed(1)
    weights = torch.distributions.StudentT(6.0).sample((48, 256)) * 0.02
    importance = torch.rand(256).square() + 0.01 if weighted else torch.ones(256)
    made = rounding.searched(weights, grid, importance if weighted else None)
    assert torch.equal(rounding.stored(made.scales, grid), made.scales)
    assert grid.signed or bool((made.scales > 0).all())

    def error(found: rounding.Rounded) -> float:
        left = rounding.values(found, grid).double() - weights.double()
        return float((left**2 * importance).sum())

    exhaustive = float(by_trying(weights, grid, importance).sum())
    assert error(made) < exhaustive * (1.05 if weighted else 1.02)
    assert error(made) < error(rounding.nearest(weights, grid)) * 0.97


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "nf4", "fp4"])
def test_the_search_is_better_than_the_largest_magnitude(name: str) -> None:
    grid = GRIDS[name]
    torch.manual_seed(2)
    weights = torch.randn(32, 256)
    found = [f(weights, grid) for f in (rounding.searched, rounding.nearest)]
    errors = [float((rounding.values(r, grid) - weights).double().square().sum()) for r in found]
    assert errors[0] < errors[1]
    assert torch.equal(rounding.stored(found[0].scales, grid), found[0].scales)


def test_a_stack_is_searched_as_its_matrices_are(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    weights, importance = torch.randn(3, 40, 256), torch.rand(3, 256)
    grid = SOUGHT["int4"]
    each = [rounding.searched(w, grid, i) for w, i in zip(weights, importance, strict=True)]
    monkeypatch.setattr(rounding, "_CHUNK", 1000)
    monkeypatch.setattr(rounding, "_TILE", 700)
    whole = rounding.searched(weights, grid, importance)
    assert torch.equal(whole.codes, torch.stack([m.codes for m in each]))
    assert torch.equal(whole.scales, torch.stack([m.scales for m in each]))


@pytest.mark.parametrize("name", [*GRIDS, *SOUGHT])
def test_strange_weights_are_searched_too(name: str) -> None:
    grid = {**GRIDS, **SOUGHT}[name]
    weights = torch.zeros(7, 256)
    weights[1] = 1e-43
    weights[2, 0] = 3e38
    weights[3] = 0.25
    weights[4, 5] = math.nan
    weights[5, 7] = -math.inf
    weights[6] = torch.linspace(-1e20, 1e20, 256)
    made = rounding.searched(weights, grid)
    found = rounding.values(made, grid)
    assert not found[0].any() and bool(made.scales.isfinite().all())
    assert float((found[3] - 0.25).abs().max()) < 0.01


@pytest.mark.parametrize("grid", [grids.integers(4, 32, "F32"), grids.integers(2, 0, "BF16")])
def test_ternary_groups_are_not_rounded(grid: Grid) -> None:
    """And groups of other weights beside them are as they would be without."""
    drawn = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (6, 64), generator=drawn)
    ternary = codes * torch.rand(6, 1, generator=drawn).bfloat16().float()
    assert torch.equal(rounding.values(rounding.searched(ternary, grid), grid), ternary)
    other = torch.randn(6, 64, generator=drawn)
    both = rounding.searched(torch.cat([ternary, other]), grid)
    alone = rounding.searched(other, grid)
    assert torch.equal(both.codes[6:], alone.codes) and torch.equal(both.scales[6:], alone.scales)
