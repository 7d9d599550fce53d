"""No text needed, and nothing runs: of experts whose router rows are alike, one stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.methods.prune.way import PruneWay
from moetool.methods.reduce import by_router
from moetool.methods.reduce.way import Needs

if TYPE_CHECKING:
    from moetool.methods.reduce.view import View


class RouterDistance(PruneWay):
    """STUN's first stage (arXiv 2409.06211): complete-linkage clusters of router rows by Euclidean
    distance, minus how often two experts are chosen together where there are statistics (both
    scaled to mean 1); of each cluster the member nearest the mean row stays.
    """

    name = "router-distance"
    auto = "no text"
    needs = Needs(text=False, gains=True)

    def keep(self, view: View, count: int) -> list[int]:
        return by_router.keep(view, count)
