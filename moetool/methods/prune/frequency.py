"""Keep the experts that are chosen most often."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.methods.prune.way import PruneWay

if TYPE_CHECKING:
    import numpy as np

    from moetool.methods.reduce.view import View


class Frequency(PruneWay):
    """How often an expert is among the top-k. A baseline: where training balanced the load it can
    be worse than chance (bincount of top-k, REAP's `frequency`).
    """

    name = "frequency"

    def score(self, view: View) -> np.ndarray:
        return view.seen.total("count")[: view.experts]
