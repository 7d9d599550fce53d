"""Keep the experts with large outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.methods.prune.way import PruneWay

if TYPE_CHECKING:
    import numpy as np

    from moetool.methods.reduce.view import View


class ExpertActivationNorm(PruneWay):
    """EAN: sum of |f_j(x)| over the tokens routed to expert j (the `ean_sum` of the REAP code,
    arXiv 2510.13999).
    """

    name = "ean"

    def score(self, view: View) -> np.ndarray:
        return view.seen.norm
