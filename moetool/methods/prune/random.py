"""The control: chance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.methods.prune.way import PruneWay
from moetool.methods.reduce.way import Needs

if TYPE_CHECKING:
    import numpy as np

    from moetool.methods.reduce.view import View


class Random(PruneWay):
    """Experts drawn by --seed, the same number in each layer: what every method must beat to be
    worth its text.
    """

    name = "random"
    chance = True
    needs = Needs(text=False)

    def score(self, view: View) -> np.ndarray:
        from moetool.kernels import draw

        return draw.uniform(view.experts, view.seed, f"prune/{view.layer}")
