"""Experts that are FFNs of the family, whole."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.data import JsonObject
from moetool.modeling.block import FfnLinears, GroupedBlock
from moetool.modeling.experts.group import ExpertGroup, dense_of
from moetool.modeling.piece import GrownPart

_STD = 0.02


class FullLinear(GrownPart):
    """`weight` as the family's lies ([out, in], or [in, out]) and, where it has one, `bias`."""

    def __init__(self, linears: FfnLinears, name: str) -> None:
        super().__init__()
        out, into = linears.shapes[name]
        self.transposed = linears.transposed
        shape = (into, out) if self.transposed else (out, into)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out)) if name in linears.biased else None

    def reset(self) -> None:
        from transformers import initialization as init

        init.normal_(self.weight, std=_STD)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dense(), self.bias)

    def dense(self) -> Tensor:
        """[out, in]"""
        return self.weight.T if self.transposed else self.weight


class FullExperts(ExpertGroup):
    """params: output_scale."""

    name: ClassVar[str] = "full"

    def part(self, params: JsonObject, linears: FfnLinears, name: str) -> nn.Module:
        return FullLinear(linears, name)

    def dense(self, block: GroupedBlock, expert: int) -> dict[str, Tensor]:
        return dense_of(self[expert], block.linears.names)
