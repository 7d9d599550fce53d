"""Keep the experts that the router gives the most weight."""

from __future__ import annotations

import numpy as np

from moetool.methods.prune.criterion import Criterion
from moetool.methods.reduce.view import View


class GateMass(Criterion):
    """Sum of an expert's combine weights over all tokens that chose it, as the model weighs them
    (sigmoid, groups and scaling included).
    """

    name = "gate-mass"

    def score(self, view: View) -> np.ndarray:
        return view.seen.total("gate")[: view.experts]
