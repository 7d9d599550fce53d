"""Which neurons matter to which tokens, against the official code's way of computing it
(OpenSparseLLMs/LLaMA-MoE-v2): lists, taken from one after the other.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from moetool.kernels import cluster, importance


def one_by_one(scores: np.ndarray, parts: int, shared: int) -> list[list[int]]:
    """The shared neurons, then those of each expert."""
    (experts, width), always = scores.shape, list[int]()
    wide = width // parts
    lists = [sorted(range(width), key=lambda n, e=e: -scores[e, n]) for e in range(experts)]
    while len(always) < shared * wide:
        often = [sum(n in row[:wide] for row in lists) for n in range(width)]
        most = [n for n in range(width) if often[n] == max(often)]
        always += most[: shared * wide - len(always)]
        lists = [[n for n in row if n not in always] for row in lists]
    places: list[list[int]] = [[] for _ in range(experts)]
    while sum(map(len, places)) < experts * wide:
        heads = [
            (scores[e, lists[e][0]], e)
            for e in range(experts)
            if lists[e] and len(places[e]) < wide
        ]
        _, expert = max(heads)
        neuron = lists[expert][0]
        places[expert].append(neuron)
        lists = [[n for n in row if n != neuron] for row in lists]
    return [always, *places]


@pytest.mark.parametrize(("parts", "shared"), [(4, 1), (4, 0), (6, 2), (8, 1)])
def test_parts_are_those_of_lists(parts: int, shared: int) -> None:
    scores = np.random.default_rng(parts).random((parts - shared, 48)) ** 3
    scores[:, :7] += 1.0  # that matter to all
    order, wide = importance.order(scores, parts, shared), 48 // parts
    always, *places = one_by_one(scores, parts, shared)
    assert order.tolist() == always + [n for place in places for n in place]
    assert sorted(order) == list(range(48)) and all(len(place) == wide for place in places)


def test_scores_are_means_over_the_tokens_of_a_cluster() -> None:
    drawn = torch.Generator().manual_seed(0)
    centres, x = torch.randn(3, 6, generator=drawn), torch.randn(40, 6, generator=drawn)
    h, gradient = (torch.randn(40, 10, generator=drawn) for _ in range(2))
    found = importance.Importance(centres, 10)
    for rows in (slice(0, 15), slice(15, 40)):
        found.add(x[rows], h[rows], gradient[rows])
    mine = (x.double() @ centres.double().T).argmax(1)
    wanted = [(h.double() * gradient.double()).abs()[mine == c].mean(0) for c in range(3)]
    assert np.allclose(found.means(), torch.stack(wanted).numpy(), atol=1e-6)
    assert not importance.Importance(centres, 10).means().any()


@pytest.mark.parametrize(("least", "most"), [(4, 8), (6, 6), (0, 24), (5, 7)])
def test_sizes_within_bounds_cost_as_little_as_a_linear_programs(least: int, most: int) -> None:
    cost = np.random.default_rng(least).random((24, 4)) + np.array([0.0, 0.3, 0.6, 2.0])
    made = cluster.within(cost, least, most)
    counts = np.bincount(made, minlength=4)
    assert counts.min() >= least and counts.max() <= most
    rows, columns = np.kron(np.eye(24), np.ones(4)), np.tile(np.eye(4), 24)
    bounds = np.concatenate([np.full(4, most), np.full(4, -least)])
    found = linprog(cost.ravel(), np.vstack([columns, -columns]), bounds, rows, np.ones(24))
    assert cost[np.arange(24), made].sum() == pytest.approx(found.fun, abs=1e-9)


def test_centres_are_means_of_clusters_of_bounded_size() -> None:
    drawn = np.random.default_rng(1)
    points = np.concatenate([drawn.normal(m, 0.1, (n, 3)) for m, n in ((0, 70), (4, 20), (9, 10))])
    centres = cluster.loose_centres(points, 3, 0.4, 0)
    labels = cluster.within(((points[:, None] - centres) ** 2).sum(-1), 20, 47)
    assert np.bincount(labels).max() <= 47 and np.bincount(labels).min() >= 20
    means = np.stack([points[labels == c].mean(0) for c in range(3)])
    assert np.allclose(centres, means, atol=0.1)
