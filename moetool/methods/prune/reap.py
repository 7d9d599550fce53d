"""Router-weighted Expert Activation Pruning; the default when there is text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.methods.prune.way import PruneWay

if TYPE_CHECKING:
    import numpy as np

    from moetool.methods.reduce.view import View


class Reap(PruneWay):
    """REAP (arXiv 2510.13999): the mean of g_j(x) |f_j(x)| over the tokens routed to expert j. g
    is the weight that the model itself gives (sigmoid and group-limited routers right, as in
    llm-compressor's REAPPruningModifier), norms only on an expert's own tokens.
    """

    name = "reap"
    auto = "text"

    def score(self, view: View) -> np.ndarray:
        return view.seen.mean("reap")
