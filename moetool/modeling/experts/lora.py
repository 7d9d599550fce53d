"""Low-rank experts under the FFN: y_e = W x + (alpha / rank) B A x (LLaVA-MoLE, MixLoRA)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.modeling.experts.delta import AddedLinear, DeltaExperts
from moetool.surgery.groups import LINEARWISE, Group
from moetool.surgery.strict import Kinds


class LowRankLinear(AddedLinear):
    """`lora_A` [rank, in] and `lora_B` [out, rank]."""

    def __init__(self, shape: tuple[int, int], rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, shape[1]))
        self.lora_B = nn.Parameter(torch.empty(shape[0], rank))

    def reset(self) -> None:
        from transformers import initialization as init

        init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        init.zeros_(self.lora_B)

    def forward(self, x: Tensor, base: Tensor | None = None, over: bool = False) -> Tensor:
        low, up = functional.linear(x, self.lora_A), self.lora_B.t()
        if base is None:
            return low @ up * self.scale
        if over:
            return base.addmm_(low, up, alpha=self.scale)
        return torch.addmm(base, low, up, alpha=self.scale)

    def dense(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.lora_B @ self.lora_A)


class LoraExperts(DeltaExperts):
    """params: rank, alpha, and `targets`, the linears that have a change (all, where not said);
    `mix`: what is mixed, the FFNs of a token's experts, or inside each linear what they add.
    """

    name: ClassVar[str] = "lora"
    needs: ClassVar[Kinds] = {"rank": int, "alpha": float}
    knows: ClassVar[Kinds] = {"targets": list, "mix": LINEARWISE}

    @classmethod
    def adding(cls, group: Group) -> Callable[[tuple[int, int]], AddedLinear]:
        rank, alpha = group.params["rank"], group.params["alpha"]
        return partial(LowRankLinear, rank=rank, scale=alpha / rank)
