"""Keep the experts that turn the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.methods.prune.way import PruneWay

if TYPE_CHECKING:
    import numpy as np

    from moetool.methods.reduce.view import View


class EasyEp(PruneWay):
    """EASY-EP (arXiv 2504.06792): sum of g_j |f_j| max(0, 1 - cos(stream before, after the
    block)), so that tokens which the block leaves as they are count little. Best with a few
    demonstrations of the one domain that matters (its code takes the 25 longest).
    """

    name = "easy-ep"

    def score(self, view: View) -> np.ndarray:
        return view.seen.easy
