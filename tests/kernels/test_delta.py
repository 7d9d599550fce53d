"""Changes kept at a few places, or in a few bits, against plain references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moetool.kernels import delta, draw
from moetool.surgery.forms.kbit import levels


def change(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("count", [1, 37, 12 * 20])
def test_the_largest_are_kept_where_they_lie(count: int) -> None:
    apart = change(12, 20).round(decimals=1)  # many are equal
    held = delta.largest(apart, count)
    order = np.argsort(-np.abs(apart.double().numpy().ravel()), kind="stable")[:count]
    wanted = np.zeros(240)
    wanted[order] = apart.double().numpy().ravel()[order]
    assert np.array_equal(delta.spread(held, 20).double().numpy().ravel(), wanted)
    assert held.rows[0] == 0 and held.rows[-1] == count == len(held.values)


def test_random_places_make_up_for_the_others() -> None:
    apart = torch.ones(50, 80)
    held = delta.drawn(apart, 400, 3, "a")
    assert held.values.unique().tolist() == [10.0]
    assert delta.spread(held, 80).sum() == apart.sum()


@pytest.mark.parametrize("count", [0, 1, 300, 999, 1000])
def test_places_are_different_ones(count: int) -> None:
    found = draw.places(1000, count, 5, "name")
    assert len(np.unique(found)) == count and (np.diff(found) > 0).all()
    assert np.array_equal(found, draw.places(1000, count, 5, "name"))
    assert count in (0, 1000) or not np.array_equal(found, draw.places(1000, count, 6, "name"))


@pytest.mark.parametrize(("bits", "most"), [(1, 0.605), (2, 0.40), (4, 0.12), (8, 0.01)])
def test_a_few_bits(bits: int, most: float) -> None:
    """Of one bit: the signs times the mean magnitude of a group, the least squared error there is;
    of a normal distribution it loses (1 - 2 / pi) ** 0.5 = 0.603.
    """
    apart, grid = change(64, 128), levels(bits, 32)
    made = delta.rounding.values(delta.coded(apart, grid), grid)
    assert delta.apart(apart, made) < most
    if bits == 1:
        each = apart.view(64, 4, 32)
        wanted = torch.where(each > 0, 1.0, -1.0) * each.abs().mean(-1, keepdim=True)
        assert torch.allclose(made, wanted.view(64, 128), rtol=1e-6)
