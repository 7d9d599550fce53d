"""The best k, each with the weight 1 (LLaVA-MoLE)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.modeling.laws.law import USUAL, Beside, Choices, CombineLaw
from moetool.surgery.route import Route


class HardLaw(CombineLaw):
    """The model's loss gives the router no gradient; a balance loss does."""

    name: ClassVar[str] = "hard"

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        self.sums = self.top_k == 1

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        return Choices(scores.topk(self.top_k, -1).indices, None)
