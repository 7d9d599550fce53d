"""Each token by itself: one linear over what the FFN sees."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from moetool.modeling.routes.scorer import Scorer
from moetool.modeling.signals import Heard


class TokenScorer(Scorer):
    """`weight` [choices, hidden] and, where the route says so, `bias` [choices]."""

    name: ClassVar[str] = "token"
    weight: Tensor

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        return functional.linear(x, self.weight, self.held("bias"))
