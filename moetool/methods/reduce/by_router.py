"""The choice of experts by their router rows alone: for the way that needs no text, and for MTP
layers, which no text reaches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.methods.reduce import clustered
from moetool.methods.reduce.view import View

if TYPE_CHECKING:
    import numpy as np


def keep(view: View, count: int) -> list[int]:
    """The `count` experts that stay: of each cluster of like rows the one nearest the mean row.

    Complete-linkage clusters by Euclidean distance, minus how often two experts are chosen
    together where there are statistics (both scaled to mean 1): STUN's first stage (arXiv
    2409.06211).
    """
    from moetool.kernels import cluster

    distance = _distance(view)

    def nearest(free: list[int], room: int) -> list[int]:
        apart = distance[free][:, free]
        labels = cluster.agglomerative(apart, room, "complete").tolist()
        found = clustered.gathered(free, labels)
        return [cluster.nearest_member(view.rows, members) for members in found]

    return clustered.keep(view, count, nearest)


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
