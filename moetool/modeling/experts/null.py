"""Experts that give nothing: a token that picks one keeps what else the block gives it (MoE++)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moetool.modeling.block import FfnLinears, GroupedBlock
from moetool.modeling.experts.group import Expert, ExpertGroup
from moetool.surgery.groups import Group
from moetool.surgery.strict import Kinds


class NullExperts(ExpertGroup):
    """They have no tensors."""

    name: ClassVar[str] = "null"
    knows: ClassVar[Kinds] = {}

    def one(self, group: Group, linears: FfnLinears) -> Expert:
        return Expert((), {})

    def of(self, block: GroupedBlock, choice: int, rows: Tensor) -> Tensor:
        return block.own_ffn(rows) if choice < self.first else torch.zeros_like(rows)

    def dense(self, block: GroupedBlock, expert: int) -> dict[str, Tensor]:
        weights = {n: getattr(block, n).weight for n in block.linears.names}
        turned = block.linears.transposed
        return {n: torch.zeros_like(w.T if turned else w) for n, w in weights.items()}
