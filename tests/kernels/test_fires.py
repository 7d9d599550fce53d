"""Cutting an FFN by what fires, against the official code's way of computing it (JarvisPei/CMoE,
CMoE_utils.py): matrices of marks, L1 distances of their columns, one assignment.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional

from moetool.kernels import cluster, fires

TOKENS, WIDTH, HIDDEN, MOST = 60, 24, 8, 5


def seen(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(rows, HIDDEN, generator=drawn) for rows in (TOKENS, WIDTH, WIDTH)
    )


def marked(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[tokens, width] of 0 and 1, token by token, in float64."""
    x, gate, up = (functional.normalize(m.double(), dim=-1) for m in (x, gate, up))
    found = torch.zeros(len(x), WIDTH, dtype=torch.float64)
    for number, token in enumerate(x):
        fired = (functional.silu(gate @ token) * (up @ token)).abs()
        found[number, fired.topk(MOST).indices] = 1.0
    return found


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_parts_are_those_of_matrices_of_marks(shared: int) -> None:
    """Same shared neurons, clusters of the same least cost, and the same representatives."""
    x, gate, up = seen(shared)
    rows = [fires.unit_rows(m) for m in (gate, up)]
    marks = fires.strongest(x, *rows, functional.silu, MOST).numpy()
    dense = marked(x, gate, up)
    assert (np.sort(marks) == np.stack([row.nonzero()[:, 0] for row in dense])).all()
    split, wide = 4, WIDTH // 4
    made = fires.parts(marks, WIDTH, split, shared)
    assert sorted(made.order) == list(range(WIDTH))
    counts = dense.sum(0)
    ranked = counts.argsort(descending=True, stable=True)
    always, others = ranked[: shared * wide], ranked[shared * wide :].sort().values
    assert (made.order[: shared * wide] == always.numpy()).all()
    assert made.shared == pytest.approx(float(counts[always].sum() / counts.sum()))
    centres = dense[:, ranked[shared * wide :][: split - shared]]
    far = torch.cdist(dense[:, others].T.contiguous(), centres.T.contiguous(), p=1)
    least = linear_sum_assignment(far.numpy().repeat(wide, 1))
    where = {int(n): i for i, n in enumerate(others)}
    cost = 0.0
    for part, first in enumerate(range(shared * wide, WIDTH, wide)):
        members = made.order[first : first + wide]
        cost += float(far[[where[int(n)] for n in members], part].sum())
        points = dense[:, members.copy()]
        mean = points.mean(1, keepdim=True)
        near = (points - mean).abs().sum(0)
        assert near[0] == pytest.approx(float(near.min()))  # who stands for it comes first
    assert cost == far.numpy().repeat(wide, 1)[least].sum()


@pytest.mark.parametrize(("points", "clusters"), [(24, 3), (40, 5), (96, 8)])
def test_even_assignment_costs_as_little_as_scipys(points: int, clusters: int) -> None:
    drawn = np.random.default_rng(points)
    for cost in (
        drawn.random((points, clusters)) + drawn.random(clusters),
        drawn.integers(0, 9, (points, clusters)),  # many ties
        np.zeros((points, clusters)),
    ):
        each, made = points // clusters, cluster.evenly(cost)
        assert (np.bincount(made, minlength=clusters) == each).all()
        places = cost.repeat(each, 1)
        least = places[linear_sum_assignment(places)].sum()
        assert cost[np.arange(points), made].sum() == pytest.approx(least, abs=1e-9)
