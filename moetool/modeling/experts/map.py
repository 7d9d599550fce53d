"""A linear map of an expert that is none of the FFN's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.modeling.piece import GrownPart


class PlainMap(GrownPart):
    """`weight` [out, in / parts], zero or drawn as torch's linears are, and `bias` [out], zero.
    `parts`: into how many the input is cut, of which each gives a part of the output.
    """

    def __init__(
        self, out: int, into: int, *, bias: bool = False, drawn: bool = False, parts: int = 1
    ) -> None:
        super().__init__()
        self.weight, self.drawn = nn.Parameter(torch.empty(out, into // parts)), drawn
        self.parts = parts
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
        if self.parts == 1:
            return functional.linear(x, self.weight, self.bias)
        cut = x.view(*x.shape[:-1], self.parts, -1)
        weight = self.weight.view(self.parts, -1, self.weight.shape[-1])
        made = torch.einsum("...pi,poi->...po", cut, weight).flatten(-2)
        return made if self.bias is None else made + self.bias
