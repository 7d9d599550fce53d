"""As many of the best as hold a share p of the softmax together (Huang et al., arXiv 2403.07652)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.modeling.laws.law import USUAL, Beside, Choices, CombineLaw, over_sum
from moetool.surgery.route import Route


class TopPLaw(CombineLaw):
    """options: threshold, the share p; renormalise, whether weights are divided by their sum. A
    token has at least one expert, and at most `top_k`.
    """

    name: ClassVar[str] = "top_p"

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        self.threshold = float(route.options["threshold"])
        self.sums = bool(route.options.get("renormalise"))

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        best, expert = scores.float().softmax(-1).topk(self.top_k, -1)
        before = best.cumsum(-1) - best
        runs = (before < self.threshold) & (best > 0)
        weight = best * runs
        weight = over_sum(weight) if self.sums else weight
        return Choices(expert.masked_fill(~runs, -1), weight.to(scores.dtype), drops=True)
