"""All experts, each with its share of a softmax (soft mixtures)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moetool.modeling.laws.law import USUAL, Beside, Choices, CombineLaw


class SoftLaw(CombineLaw):
    """`top_k` of the route says nothing here."""

    name: ClassVar[str] = "soft"
    sums = True

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        every = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
        return Choices(every, scores.float().softmax(-1).to(scores.dtype))
