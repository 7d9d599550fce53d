"""Keep the experts with large outputs."""

from __future__ import annotations

import numpy as np

from moetool.methods.prune.criterion import Criterion
from moetool.methods.reduce.view import View


class ExpertActivationNorm(Criterion):
    """EAN: sum of |f_j(x)| over the tokens routed to expert j (the `ean_sum` of the REAP code,
    arXiv 2510.13999).
    """

    name = "ean"

    def score(self, view: View) -> np.ndarray:
        return view.seen.norm
