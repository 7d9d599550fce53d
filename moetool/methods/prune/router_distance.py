"""No text needed: of experts whose router rows are alike, one stays. The default when there is no
text.
"""

from __future__ import annotations

import numpy as np

from moetool.kernels import cluster
from moetool.methods.prune.criterion import Criterion
from moetool.methods.reduce.view import View


class RouterDistance(Criterion):
    """STUN's first stage (arXiv 2409.06211): complete-linkage clusters of router rows by Euclidean
    distance, minus how often two experts are chosen together where there are statistics (both
    scaled to mean 1); of each cluster the member nearest the mean row stays.
    """

    name = "router-distance"
    text = False

    def keep(self, view: View, count: int) -> list[int]:
        distance = self._distance(view)
        kept: list[int] = []
        for members in view.groups():
            free = [e for e in members if e not in view.protected]
            room = view.share(count) - (len(members) - len(free))
            kept += [e for e in members if e in view.protected]
            labels = (
                cluster.agglomerative(distance[np.ix_(free, free)], room, "complete")
                if room > 0
                else np.array([])
            )
            kept += [
                cluster.nearest_member(view.rows, [free[i] for i in np.nonzero(labels == label)[0]])
                for label in sorted(set(labels.tolist()))
            ]
        return sorted(kept)

    def _distance(self, view: View) -> np.ndarray:
        apart = cluster.distances(view.rows)
        apart = apart / max(1e-30, apart.mean())
        if view.stats is not None and view.stats.has("together"):
            together = view.stats.together[: view.experts, : view.experts].copy()
            np.fill_diagonal(together, 0.0)
            apart = np.maximum(apart - together / max(1e-30, together.mean()) * 0.5 + 0.5, 0.0)
        return apart
