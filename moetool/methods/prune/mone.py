"""A dropped expert becomes a constant, where the family can hold one."""

from __future__ import annotations

import numpy as np

from moetool.methods.prune.criterion import Criterion
from moetool.methods.reduce.view import View


class Mone(Criterion):
    """MoNE (arXiv 2507.00390): how often an expert is chosen times how much its output varies,
    sqrt of the summed variance; an expert that goes leaves its mean output behind. Only families
    with a bias on down_proj (gpt_oss, openai_privacy_filter) can hold that constant; the number of
    experts stays, their matrices are zero.
    """

    name = "mone"
    constant = True

    def score(self, view: View) -> np.ndarray:
        mean = view.seen.mean("out_sum")
        variance = np.maximum(view.seen.mean("out_sq") - mean * mean, 0.0).sum(1)
        return (
            np.sqrt(variance)
            * view.seen.mean("gate")
            * view.seen.total("count")[: view.experts]
            / max(1, view.seen.tokens)
        )
