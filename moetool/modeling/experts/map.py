"""A linear map of an expert that is none of the FFN's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.modeling.piece import GrownPart


class PlainMap(GrownPart):
    """`weight` [out, in], zero or drawn as torch's linears are, and `bias` [out], zero."""

    def __init__(self, out: int, into: int, *, bias: bool = False, drawn: bool = False) -> None:
        super().__init__()
        self.weight, self.drawn = nn.Parameter(torch.empty(out, into)), drawn
        self.bias = nn.Parameter(torch.empty(out)) if bias else None

    def reset(self) -> None:
        from transformers import initialization as init

        if self.drawn:
            init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            init.zeros_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)
