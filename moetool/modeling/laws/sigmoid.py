"""The best k by score, each with a sigmoid of its own (DeepSeek-V3; Mixture-of-Heads)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.modeling.laws.law import USUAL, Beside, Choices, CombineLaw, over_sum
from moetool.surgery.route import Route


class SigmoidLaw(CombineLaw):
    """options: renormalise, whether weights are divided by their sum."""

    name: ClassVar[str] = "sigmoid"

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        self.sums = bool(route.options.get("renormalise"))

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        best, expert = scores.float().topk(self.top_k, -1)
        weight = best.sigmoid()
        return Choices(expert, (over_sum(weight) if self.sums else weight).to(scores.dtype))

    def shares(self, scores: Tensor) -> Tensor:
        return over_sum(scores.float().sigmoid())
