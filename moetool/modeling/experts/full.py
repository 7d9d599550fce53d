"""Experts that are FFNs of the family, whole."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.modeling.block import FfnLinears, GroupedBlock, Linear
from moetool.modeling.experts.group import ExpertGroup, dense_of
from moetool.modeling.piece import GrownPart
from moetool.surgery.groups import ACTIVATIONS, Group
from moetool.surgery.strict import Kinds

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
    """params: output_scale, and `activation`, one that they have instead of the family's (MoE-X)."""

    name: ClassVar[str] = "full"
    knows: ClassVar[Kinds] = {"output_scale": bool, "activation": ACTIVATIONS}

    def __init__(self, group: Group, linears: FfnLinears) -> None:
        super().__init__(group, linears)
        self.activation = group.params.get("activation")

    def swapped(self, block: GroupedBlock, expert: nn.Module) -> dict[str, Linear]:
        found = super().swapped(block, expert)
        if self.activation is None:
            return found
        from transformers.activations import ACT2FN

        return found | {_activation_of(block): ACT2FN[self.activation]}

    def part(self, params: JsonObject, linears: FfnLinears, name: str) -> nn.Module:
        return FullLinear(linears, name)

    def dense(self, block: GroupedBlock, expert: int) -> dict[str, Tensor]:
        return dense_of(self[expert], block.linears.names)


def _activation_of(block: GroupedBlock) -> str:
    """What the block calls its activation. MoetoolError where it has none by itself."""
    homes = ("transformers.activations", "torch.nn.modules.activation")
    for name, module in block.named_children():
        if type(module).__module__ in homes:
            return name
    raise MoetoolError(
        "experts with an activation of their own, in an FFN that has none by itself",
        file="config.json",
        expected="an FFN with an activation as a module",
        found=type(block).__name__,
        hint="leave out --activation for this family",
    )
