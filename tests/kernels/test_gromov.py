"""Gromov-Wasserstein couplings against their definition and, where it is installed, against POT."""

from __future__ import annotations

import numpy as np
import pytest

from moetool.kernels import gromov


def distances(points: np.ndarray) -> np.ndarray:
    """All squared distances over their mean."""
    each = points[:, None] - points[None]
    squares = np.square(each).sum(-1)
    made: np.ndarray = squares / squares.mean()
    return made


def loss(one: np.ndarray, two: np.ndarray, plan: np.ndarray) -> float:
    """The sum of the definition, over four indices."""
    apart = np.square(one[:, :, None, None] - two[None, None])
    return float(np.einsum("ikjl,ij,kl->", apart, plan, plan))


def test_an_isometry_is_found() -> None:
    """Points that were turned, moved, scaled and put in another order stand where they stood."""
    dice = np.random.default_rng(0)
    points = dice.normal(size=(40, 5)) ** 3
    order, turn = dice.permutation(40), np.linalg.qr(dice.normal(size=(5, 5)))[0]
    found = gromov.couple(points, 7 * points[order] @ turn + 3)
    assert (found.plan.argmax(0) == order).all() and found.loss < 1e-3 and found.steps > 3


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_a_plan_is_even_and_its_loss_is_the_definitions(epsilon: float) -> None:
    dice = np.random.default_rng(1)
    one, two = dice.normal(size=(9, 3)), dice.normal(size=(7, 4))
    found = gromov.couple(one, two, epsilon)
    assert found.plan.sum(0) == pytest.approx(np.full(7, 1 / 7), rel=1e-6)
    assert found.plan.sum(1) == pytest.approx(np.full(9, 1 / 9), rel=1e-6)
    told = loss(distances(one), distances(two), found.plan)
    even = loss(distances(one), distances(two), np.full((9, 7), 1 / 63))
    assert found.loss == pytest.approx(told, rel=1e-6) and told < even


def test_distances_that_are_no_matrix() -> None:
    points = np.random.default_rng(2).normal(size=(11, 4)) + 50
    cloud, far = gromov.Cloud(points), distances(points)
    assert cloud.times(np.eye(11)) == pytest.approx(far, abs=1e-9)
    assert cloud.squares() == pytest.approx(np.square(far).mean(1))
    same = gromov.couple(np.ones((3, 2)), points)  # no distances at all: nothing to tell apart
    assert same.plan == pytest.approx(np.full((3, 11), 1 / 33))


@pytest.mark.filterwarnings("ignore")  # of POT itself
@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_as_pot_has_it(epsilon: float) -> None:
    ot = pytest.importorskip("ot")
    dice = np.random.default_rng(0)
    points = dice.normal(size=(40, 5)) ** 3
    other = points[dice.permutation(40)] + dice.normal(size=(40, 5)) * 0.1
    even = np.full(40, 1 / 40)
    theirs = ot.gromov.entropic_gromov_wasserstein(
        *(distances(points), distances(other), even, even, "square_loss"),
        epsilon=epsilon,
        solver="PPA",
        max_iter=100,
        tol=1e-12,
    )
    found = gromov.couple(points, other, epsilon)
    assert found.plan == pytest.approx(theirs, abs=2e-3 / 40)
