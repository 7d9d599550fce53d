"""Which point of one cloud stands where a point of another does, by distances inside each alone:
entropic Gromov-Wasserstein couplings (Peyré, Cuturi and Solomon, ICML 2016).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_TINY = 1e-300
# Passes over both margins, at most, and how far a margin may be off at the end, in shares of it: in
# each step, which the next one makes good, and of the last plan.
_STEP, _LAST = (50, 1e-4), (5000, 1e-9)


class Coupling(NamedTuple):
    """A plan [points, others] that sums to one, uniform on both sides; the Gromov-Wasserstein loss
    of it, sum over i, k, j, l of (c_ik - d_jl)^2 T_ij T_kl; and steps taken.
    """

    plan: np.ndarray
    loss: float
    steps: int


class Cloud:
    """Points [count, width] of any scale, by their squared distances over the mean of all: never a
    matrix of all pairs (of the distances |x|^2 + |y|^2 - 2 x.y, which have rank width + 2).
    """

    def __init__(self, points: np.ndarray) -> None:
        held = np.asarray(points, np.float64)
        held = held - held.mean(0)
        squares = np.square(held).sum(1)
        mean = 2.0 * squares.mean()  # of all pairs, since the points are centred
        scale = 1.0 / mean if mean > 0 else 1.0
        one = np.ones(len(held))
        self.left = np.column_stack([squares * scale, one, held * (-2.0 * scale)])
        self.right = np.column_stack([one, squares * scale, held])

    def __len__(self) -> int:
        return len(self.left)

    def times(self, matrix: np.ndarray) -> np.ndarray:
        """distances @ matrix."""
        made: np.ndarray = self.left @ (self.right.T @ matrix)
        return made

    def squares(self) -> np.ndarray:
        """The mean square of each point's distances [count], in pieces of bounded size."""
        piece = max(1, (1 << 23) // len(self))
        starts = range(0, len(self), piece)
        each = (np.square(self.left[a : a + piece] @ self.right.T).mean(1) for a in starts)
        return np.concatenate([*each])


def couple(
    points: np.ndarray, others: np.ndarray, epsilon: float = 0.1, steps: int = 100
) -> Coupling:
    """points [n, a], others [m, b] -> a coupling of least loss near the even one, found by proximal
    steps (Xu et al., ICML 2019): each is a Sinkhorn projection of the last plan times
    exp(-gradient / epsilon). Held at once: five arrays of [n, m] in float64.
    """
    one, two = Cloud(points), Cloud(others)
    n, m = len(one), len(two)
    constant = one.squares()[:, None] + two.squares()[None, :]
    plan, before = np.full((n, m), 1.0 / (n * m)), np.inf
    for step in range(steps + 1):
        cost = _cost(constant, one, two, plan)
        loss = float((cost * plan).sum())
        if step == steps or before - loss < 1e-6 * before:
            break
        before = loss
        cost -= cost.min(1, keepdims=True)
        plan = _even(np.exp(cost * (-2.0 / epsilon)) * plan, *_STEP)
    plan = _even(plan, *_LAST)
    return Coupling(plan, float((_cost(constant, one, two, plan) * plan).sum()), step)


def _cost(constant: np.ndarray, one: Cloud, two: Cloud, plan: np.ndarray) -> np.ndarray:
    """What a unit of mass costs at each place, where the others lie as planned [n, m]."""
    made: np.ndarray = constant - 2.0 * two.times(one.times(plan).T).T
    return made


def _even(kernel: np.ndarray, passes: int, off: float) -> np.ndarray:
    """Scale rows and columns until each row sums to 1/n and each column to 1/m."""
    n, m = kernel.shape
    left, right = np.full(n, 1.0), np.full(m, 1.0)
    for _ in range(passes):
        left = 1.0 / n / np.maximum(kernel @ right, _TINY)
        sums = kernel.T @ left
        if np.abs(right * sums * m - 1.0).max() < off:
            break
        right = 1.0 / m / np.maximum(sums, _TINY)
    made: np.ndarray = left[:, None] * kernel * right[None, :]
    return made
