"""The choice of experts by their router rows alone: for the way that needs no text, and for MTP
layers, which no text reaches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.methods.reduce.view import View

if TYPE_CHECKING:
    import numpy as np


def keep(view: View, count: int) -> list[int]:
    """The `count` experts that stay: of each cluster of like rows the one nearest the mean row.

    Complete-linkage clusters by Euclidean distance, minus how often two experts are chosen
    together where there are statistics (both scaled to mean 1): STUN's first stage (arXiv
    2409.06211).
    """
    distance = _distance(view)
    kept: list[int] = []
    for members in view.groups():
        free = [e for e in members if e not in view.protected]
        room = view.share(count) - (len(members) - len(free))
        kept += [e for e in members if e in view.protected]
        kept += _nearest(view.rows, distance, free, room)
    return sorted(kept)


def _nearest(rows: np.ndarray, distance: np.ndarray, free: list[int], room: int) -> list[int]:
    """One expert of each of `room` clusters of the free ones."""
    import numpy as np

    from moetool.kernels import cluster

    if room <= 0:
        return []
    labels = cluster.agglomerative(distance[np.ix_(free, free)], room, "complete")
    return [
        cluster.nearest_member(rows, [free[i] for i in np.nonzero(labels == label)[0]])
        for label in sorted(set(labels.tolist()))
    ]


def _distance(view: View) -> np.ndarray:
    """How unlike two experts are [experts, experts]."""
    import numpy as np

    from moetool.kernels import cluster

    apart = cluster.distances(view.rows)
    apart = apart / max(1e-30, apart.mean())
    if view.stats is not None and view.stats.has("together"):
        together = view.stats.together[: view.experts, : view.experts].copy()
        np.fill_diagonal(together, 0.0)
        apart = np.maximum(apart - together / max(1e-30, together.mean()) * 0.5 + 0.5, 0.0)
    made: np.ndarray = apart
    return made
