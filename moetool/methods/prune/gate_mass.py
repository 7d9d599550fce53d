"""Keep the experts that the router gives the most weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.methods.prune.way import PruneWay

if TYPE_CHECKING:
    import numpy as np

    from moetool.methods.reduce.view import View


class GateMass(PruneWay):
    """Sum of an expert's combine weights over all tokens that chose it, as the model weighs them
    (sigmoid, groups and scaling included).
    """

    name = "gate-mass"

    def score(self, view: View) -> np.ndarray:
        return view.seen.total("gate")[: view.experts]
