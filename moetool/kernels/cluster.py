"""Clustering with clusters of one size. scikit-learn finds the centres; the balanced assignment is
ours (it has none).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np


def balanced_kmeans(points: Any, clusters: int, seed: int, *, rounds: int = 8) -> np.ndarray:
    """Labels [n] in 0..clusters-1, each used n/clusters times. points [n, d]; n must be a multiple
    of clusters.

    k-means centres (scikit-learn), then rounds of balanced assignment and new centres until
    nothing moves. Used for LLaMA-MoE's clustering split (pjlab-sys4nlp/llama-moe,
    utils/expert_construction).
    """
    from sklearn.cluster import KMeans

    data = np.asarray(points, dtype=np.float32)
    if len(data) % clusters:
        raise ValueError(f"{len(data)} points cannot fill {clusters} equal clusters")
    centres = (
        KMeans(clusters, n_init=1, max_iter=20, random_state=seed, algorithm="lloyd")
        .fit(data)
        .cluster_centers_
    )
    labels = assign_evenly(_distances(data, centres))
    for _ in range(rounds):
        centres = np.stack([data[labels == c].mean(0) for c in range(clusters)])
        new = assign_evenly(_distances(data, centres))
        if (new == labels).all():
            break
        labels = new
    return labels


def _distances(data: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared Euclidean [n, clusters], less each point's own norm (which changes no choice)."""
    return np.asarray((centres**2).sum(1)[None, :] - 2.0 * data @ centres.T)


def assign_evenly(cost: np.ndarray) -> np.ndarray:
    """Labels [n] with equal counts and low total cost [n, k]: place points by regret, then swap
    pairs while it pays.
    """
    n, k = cost.shape
    room = np.full(k, n // k)
    labels = np.full(n, -1)
    ranked = np.argsort(cost, axis=1, kind="stable")
    two = np.partition(cost, min(1, k - 1), axis=1)
    for point in np.argsort(-(two[:, min(1, k - 1)] - two[:, 0]), kind="stable"):
        home = next(c for c in ranked[point] if room[c])
        labels[point] = home
        room[home] -= 1
    for _ in range(20):
        if not _swap(cost, labels, k):
            break
    return labels


def loose_centres(points: np.ndarray, clusters: int, slack: float, seed: int) -> np.ndarray:
    """Centres [clusters, d] of clusters whose sizes are within n / clusters * (1 - slack .. 1 +
    slack): k-means (scikit-learn), then rounds of assignment within these sizes and new centres.
    """
    from sklearn.cluster import KMeans

    data, each = np.asarray(points, np.float32), len(points) / clusters
    least, most = int(each * (1 - slack)), max(1, -int(-each * (1 + slack) // 1))
    fit = KMeans(clusters, n_init=1, max_iter=100, random_state=seed, algorithm="lloyd").fit(data)
    centres, labels = fit.cluster_centers_, np.full(len(data), -1)
    for _ in range(20):
        new = within(_distances(data, centres), least, most)
        if (new == labels).all():
            break
        labels = new
        held = [data[labels == c] for c in range(clusters)]
        centres = np.stack([m.mean(0) if len(m) else centres[c] for c, m in enumerate(held)])
    return np.asarray(centres, np.float32)


def evenly(cost: np.ndarray) -> np.ndarray:
    """Labels [n] with equal counts and the least total cost [n, k]."""
    each = len(cost) // cost.shape[1]
    return within(cost, each, each)


def within(cost: np.ndarray, least: int, most: int) -> np.ndarray:
    """Labels [n] with counts of least to most and the least total cost [n, k].

    Every point begins where it costs least; then, point by point, clusters with too many give to
    those with room along the cheapest chain of moves, and those with too few take (successive
    shortest paths, which stay optimal), over k clusters and not over n places: n * k numbers and k
    searches, where an assignment of points to places holds n * n.
    """
    k, cost = cost.shape[1], cost.astype(np.float64)
    labels: np.ndarray = cost.argmin(1)
    counts = np.bincount(labels, minlength=k)
    moves = [_cheapest(cost, labels, c) for c in range(k)]
    while (counts > most).any() or (counts < least).any():
        full = (counts > most).any()
        giving = counts > (most if full else least)
        path = _chain(
            np.stack([move.cost for move in moves]), giving, counts < (most if full else least)
        )
        for home, other in pairwise(path):
            labels[moves[home].point[other]] = other
        counts[path[0]] -= 1
        counts[path[-1]] += 1
        for c in path:
            moves[c] = _cheapest(cost, labels, c)
    return labels


class _Moves(NamedTuple):
    """What it costs to move a point from one cluster into each [k], and which point that is."""

    cost: np.ndarray
    point: np.ndarray


def _cheapest(cost: np.ndarray, labels: np.ndarray, cluster: int) -> _Moves:
    members = np.flatnonzero(labels == cluster)
    if not len(members):
        return _Moves(np.full(cost.shape[1], np.inf), np.zeros(cost.shape[1], int))
    more = cost[members] - cost[members, cluster][:, None]
    first = more.argmin(0)
    found = more[first, np.arange(cost.shape[1])]
    found[cluster] = np.inf
    return _Moves(found, members[first])


def _chain(moves: np.ndarray, giving: np.ndarray, taking: np.ndarray) -> list[int]:
    """The cheapest way, by clusters, from one that gives to one that takes; moves [k, k]."""
    far = np.where(giving, 0.0, np.inf)
    before = np.full(len(far), -1)
    for _ in range(len(far)):
        through = far[:, None] + moves
        best = through.argmin(0)
        nearer = through.min(0) < far
        if not nearer.any():
            break
        far, before = np.where(nearer, through.min(0), far), np.where(nearer, best, before)
    at = int(np.where(taking, far, np.inf).argmin())
    path = [at]
    while before[at] >= 0:
        at = int(before[at])
        path.append(at)
    return path[::-1]


def _swap(cost: np.ndarray, labels: np.ndarray, k: int) -> bool:
    """One pass over all pairs of clusters: exchange the members that gain most from it, one pair
    for one.
    """
    moved = False
    for a in range(k):
        for b in range(a + 1, k):
            left, right = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
            gain_left, gain_right = cost[left, a] - cost[left, b], cost[right, b] - cost[right, a]
            order_left, order_right = (
                np.argsort(-gain_left, kind="stable"),
                np.argsort(-gain_right, kind="stable"),
            )
            pays = gain_left[order_left] + gain_right[order_right] > 1e-6
            count = int(pays.argmin()) if not pays.all() else len(pays)
            if count:
                labels[left[order_left[:count]]], labels[right[order_right[:count]]] = b, a
                moved = True
    return moved


def agglomerative(distance: np.ndarray, clusters: int, linkage: str) -> np.ndarray:
    """Labels [n] of hierarchical clustering on a distance matrix [n, n]: `average`, `complete` or
    `ward` (Euclidean distances), by scipy.
    """
    from scipy.cluster.hierarchy import cut_tree
    from scipy.cluster.hierarchy import linkage as link
    from scipy.spatial.distance import squareform

    n = len(distance)
    if clusters >= n:
        return np.arange(n)
    even = (distance + distance.T) / 2
    np.fill_diagonal(even, 0.0)
    tree = link(squareform(np.maximum(even, 0.0), checks=False), linkage)
    return np.asarray(cut_tree(tree, n_clusters=clusters)[:, 0])


def ward(points: np.ndarray, clusters: int) -> np.ndarray:
    """Labels [n] of Ward's hierarchy on points [n, d] (the least growth of squared distances from
    the clusters' means), by scikit-learn.
    """
    from sklearn.cluster import AgglomerativeClustering

    if clusters >= len(points):
        return np.arange(len(points))
    return np.asarray(AgglomerativeClustering(clusters, linkage="ward").fit_predict(points))


def embed(gram: np.ndarray) -> np.ndarray:
    """Points [n, n] with these inner products [n, n]: distances between them are those of the
    (much longer) vectors behind the Gram matrix.
    """
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def distances(points: np.ndarray) -> np.ndarray:
    """Euclidean distances [n, n] of points [n, d]."""
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(points, points))


def kmeans(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Labels [n] of k-means (k-means++ starts, the best of 10), by scikit-learn; every cluster
    holds a point.
    """
    from sklearn.cluster import KMeans

    if clusters >= len(points):
        return np.arange(len(points))
    found = KMeans(clusters, n_init=10, random_state=seed).fit(points)
    labels = np.asarray(found.labels_)
    for empty in sorted(
        set(range(clusters)) - set(labels.tolist())
    ):  # duplicates of a point can leave centres without points
        crowded = np.bincount(labels, minlength=clusters).argmax()
        labels[np.nonzero(labels == crowded)[0][-1]] = empty
    return labels


def nearest_member(
    points: np.ndarray, members: list[int], weights: np.ndarray | None = None
) -> int:
    """The member nearest the (weighted) mean of a cluster; the first where several are as near
    (but for rounding).
    """
    centre = np.average(points[members], axis=0, weights=weights)
    apart = ((points[members] - centre) ** 2).sum(1)
    near = apart.min() + 1e-9 * (points[members] ** 2).sum(1).max()
    return members[int(np.argmax(apart <= near))]
