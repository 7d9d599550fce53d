"""The best k, their shares divided by the sum of these (Mixtral, MixLoRA)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.modeling.laws.law import USUAL, Beside, Choices, CombineLaw


class RenormalisedLaw(CombineLaw):
    """Softmax over the chosen scores alone, which is the same."""

    name: ClassVar[str] = "renormalised"
    sums = True

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        best, expert = scores.float().topk(self.top_k, -1)
        if self.top_k == 1:  # a share of itself
            return Choices(expert, None)
        return Choices(expert, best.softmax(-1).to(scores.dtype))
