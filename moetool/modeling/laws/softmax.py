"""The best k by softmax over all; each keeps its share (Switch, MoTE)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.modeling.laws.law import USUAL, Beside, Choices, CombineLaw


class SoftmaxLaw(CombineLaw):
    """Weights sum to less than one."""

    name: ClassVar[str] = "softmax"

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        weight, expert = scores.float().softmax(-1).topk(self.top_k, -1)
        return Choices(expert, weight.to(scores.dtype))
