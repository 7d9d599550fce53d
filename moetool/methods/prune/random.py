"""The control: chance."""

from __future__ import annotations

import numpy as np

from moetool.kernels import draw
from moetool.methods.prune.criterion import Criterion
from moetool.methods.reduce.view import View


class Random(Criterion):
    """Experts drawn by --seed, the same number in each layer: what every method must beat to be
    worth its text.
    """

    name = "random"
    text = False

    def score(self, view: View) -> np.ndarray:
        return draw.uniform(view.experts, view.seed, f"prune/{view.layer}")
