"""Clusters of one size and of several, against brute force on small cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moetool.kernels import cluster

DICE = np.random.default_rng(11)


def evenly(points: int, clusters: int) -> list[tuple[int, ...]]:
    """Every way to deal points to clusters of one size."""
    size = points // clusters
    every = itertools.product(range(clusters), repeat=points)
    return [labels for labels in every if all(labels.count(c) == size for c in range(clusters))]


@pytest.mark.parametrize(("points", "clusters"), [(4, 2), (6, 3), (6, 2), (8, 2), (5, 1), (3, 3)])
def test_even_assignment_is_near_the_best_there_is(points: int, clusters: int) -> None:
    worst = 0.0
    for seed in range(20):
        cost = np.random.default_rng(seed).random((points, clusters))
        labels = cluster.assign_evenly(cost)
        assert np.bincount(labels, minlength=clusters).tolist() == [points // clusters] * clusters
        made = cost[np.arange(points), labels].sum()
        best = min(
            sum(cost[i, c] for i, c in enumerate(dealt)) for dealt in evenly(points, clusters)
        )
        assert made >= best - 1e-12
        worst = max(worst, (made - best) / best)
    # Swaps of pairs find the optimum of two clusters; of three they may miss by a cycle.
    assert worst <= (1e-9 if clusters <= 2 else 0.25)


def test_ties_are_broken_alike() -> None:
    assert (
        cluster.assign_evenly(np.zeros((6, 3))).tolist()
        == cluster.assign_evenly(np.ones((6, 3))).tolist()
    )


def test_balanced_kmeans_is_the_same_again() -> None:
    points = DICE.standard_normal((48, 5))
    first = cluster.balanced_kmeans(points, 4, 7)
    assert (cluster.balanced_kmeans(points, 4, 7) == first).all()
    assert np.bincount(first).tolist() == [12] * 4


def test_one_cluster_and_one_point_each() -> None:
    points = DICE.standard_normal((6, 3))
    assert set(cluster.balanced_kmeans(points, 1, 0)) == {0}
    assert sorted(cluster.balanced_kmeans(points, 6, 0)) == list(range(6))


def average(distance: np.ndarray, a: list[int], b: list[int]) -> float:
    return float(np.mean([distance[i, j] for i in a for j in b]))


def complete(distance: np.ndarray, a: list[int], b: list[int]) -> float:
    return float(max(distance[i, j] for i in a for j in b))


@pytest.mark.parametrize("rule", [average, complete])
@pytest.mark.parametrize("clusters", [1, 2, 4, 7])
def test_hierarchies_join_the_nearest_again_and_again(rule: object, clusters: int) -> None:
    distance = cluster.distances(DICE.standard_normal((9, 4)))
    groups = [[i] for i in range(9)]
    while len(groups) > clusters:
        pairs = itertools.combinations(range(len(groups)), 2)
        a, b = min(pairs, key=lambda p: rule(distance, groups[p[0]], groups[p[1]]))  # type: ignore[operator]
        groups[a] += groups.pop(b)
    labels = cluster.agglomerative(distance, clusters, rule.__name__)  # type: ignore[attr-defined]
    made = {tuple(np.flatnonzero(labels == c)) for c in set(labels.tolist())}
    assert made == {tuple(sorted(g)) for g in groups}


def test_an_uneven_distance_matrix_is_evened() -> None:
    """Rounding leaves distances that differ by direction, and small negative ones."""
    distance = cluster.distances(DICE.standard_normal((5, 3)))
    bent = distance + np.triu(np.full((5, 5), 1e-9), 1)
    bent[0, 0] = -1e-12
    assert (
        cluster.agglomerative(bent, 2, "average") == cluster.agglomerative(distance, 2, "average")
    ).all()


@pytest.mark.parametrize("clusters", [1, 3, 6, 9])
def test_ward_is_what_scipy_says(clusters: int) -> None:
    points = DICE.standard_normal((9, 4))
    made = cluster.ward(points, clusters)
    other = cluster.agglomerative(cluster.distances(points), clusters, "ward")
    assert len({*zip(made.tolist(), other.tolist(), strict=True)}) == clusters


def test_distances_are_euclids() -> None:
    points = DICE.standard_normal((6, 4))
    made = cluster.distances(points)
    for i, j in itertools.product(range(6), repeat=2):
        assert made[i, j] == pytest.approx(np.sqrt(((points[i] - points[j]) ** 2).sum()))


def test_kmeans_finds_blobs_and_is_the_same_again() -> None:
    truth = np.repeat(np.arange(3), 5)
    points = np.eye(3)[truth] * 20 + DICE.standard_normal((15, 3))
    labels = cluster.kmeans(points, 3, 1)
    assert all(len(set(labels[truth == c].tolist())) == 1 for c in range(3))
    assert (cluster.kmeans(points, 3, 1) == labels).all()
    assert cluster.kmeans(points, 15, 0).tolist() == list(range(15))
    assert cluster.kmeans(points, 99, 0).tolist() == list(range(15))


def test_the_nearest_member_of_a_weighted_mean() -> None:
    points = np.array([[0.0], [1.0], [4.0], [100.0]])
    assert cluster.nearest_member(points, [0, 1, 2]) == 1
    assert cluster.nearest_member(points, [0, 1, 2], np.array([0.0, 0.1, 0.9])) == 2
    assert cluster.nearest_member(points, [3]) == 3


def test_gram_matrices_with_rounding_below_zero() -> None:
    vectors = DICE.standard_normal((5, 2)) @ DICE.standard_normal((2, 400))  # rank two
    made = cluster.embed(vectors @ vectors.T)
    assert np.isfinite(made).all()
    np.testing.assert_allclose(made @ made.T, vectors @ vectors.T, atol=1e-8)
