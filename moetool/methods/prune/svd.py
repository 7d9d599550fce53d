"""Experts that do alike in the directions which the layer's experts share: one of each cluster
stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetool.errors import UsageError
from moetool.methods.field import FINE
from moetool.methods.options import option
from moetool.methods.prune.way import PruneWay
from moetool.methods.reduce import clustered
from moetool.methods.reduce.way import Needs

if TYPE_CHECKING:
    from moetool.methods.reduce.view import View
    from moetool.surgery.experts import Mixture


@dataclass(frozen=True)
class Rank:
    """What svd alone is told."""

    rank_energy: float = option(
        0.5,
        "share of the squared singular values that the shared basis keeps; 1 keeps all",
        FINE,
        unit="share",
    )


class Svd(PruneWay):
    """SVD clustering: each expert as coefficients in a low-rank basis of the layer's experts (joint
    SVD of gate and up, and of down), neurons matched, Ward's clusters (scikit-learn); of each the
    member nearest the centre stays, or with text the one of largest REAP saliency.
    """

    name = "svd"
    needs = Needs(text=False, weights=True, gains=True)
    Options = Rank

    def told(self) -> None:
        super().told()
        if not 0.0 < self.own.rank_energy <= 1.0:
            raise UsageError(
                "--rank-energy lies above 0 and at most at 1",
                found=self.own.rank_energy,
                hint="for example --rank-energy 0.5",
            )

    def buffers(self, mixture: Mixture) -> int:
        from moetool.kernels import shared_basis

        hidden = int(mixture.layout.field("hidden", mixture.text_model.config))
        width = max(map(mixture.width, mixture.layers))
        return shared_basis.memory(mixture.experts, hidden, width)

    def keep(self, view: View, count: int) -> list[int]:
        from moetool.forward import finite
        from moetool.kernels import cluster, shared_basis

        finite.check_experts(view.mixture.source.folder, view.layer, view.block.experts)
        points = shared_basis.points(view.block.experts, self.own.rank_energy)
        saliency = None if view.stats is None else view.seen.mean("reap")

        def best(members: list[int]) -> int:
            if saliency is None:
                return cluster.nearest_member(points, members)
            return max(members, key=lambda e: (saliency[e], -e))

        def pick(free: list[int], room: int) -> list[int]:
            labels = cluster.ward(points[free], room).tolist()
            return [best(members) for members in clustered.gathered(free, labels)]

        return clustered.keep(view, count, pick)
