"""Each token by itself: one linear over what the FFN sees."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.errors import MoetoolError
from moetool.modeling.routes.scorer import Scorer
from moetool.surgery.groups import Group

_STD = 0.02


class TokenScorer(Scorer):
    """`weight` [choices, hidden] and, where the route says so, `bias` [choices]."""

    name: ClassVar[str] = "token"

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__(group, hidden)
        if group.route.options:
            raise MoetoolError(
                "a route by token has no options",
                file="config.json",
                found=", ".join(map(str, group.route.options)),
                hint="a newer moetool may know them",
            )
        self.weight = nn.Parameter(torch.empty(group.choices, hidden))
        self.bias = nn.Parameter(torch.empty(group.choices)) if group.route.bias else None

    def reset(self) -> None:
        from transformers import initialization as init

        init.normal_(self.weight, std=_STD)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor, *signals: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)
