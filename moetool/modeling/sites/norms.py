"""The norms of a layer: experts are weights of a norm (Mixture-of-Transformers, arXiv 2411.04996)."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from moetool.modeling.block import FfnLinears, Grouped, Swapped
from moetool.modeling.experts.group import ExpertGroup
from moetool.modeling.piece import GrownPart
from moetool.modeling.sites.site import GroupSite
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import Group
from moetool.surgery.strict import Kinds


class GroupedNorm(Grouped):
    """A norm with one group of experts."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., width] -> the same, each token by the weights of its experts."""
        group, law = self.held[0]
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        picked = self.picked(group, law, x)
        made = picked.each(picked.rows(x), partial(self._by, group))
        return picked.back(picked.weighted(made)).view(hidden_states.shape)

    def _by(self, group: Group, choice: int, rows: Tensor) -> Tensor:
        """The stock norm of rows, with the weights behind a choice; the first are its own."""
        if choice == 0:
            return self.stock.forward(self, rows)  # type: ignore[no-any-return]
        expert = self.get_submodule(group.expert(choice - 1))
        swapped = Swapped(self, dict(expert.named_parameters()))
        return self.stock.forward(swapped, rows)  # type: ignore[no-any-return]


class NormWeights(GrownPart):
    """`weight` [width] and, where the norm has one, `bias`."""

    def __init__(self, width: int, biased: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if biased else None

    def reset(self) -> None:
        from transformers import initialization as init

        init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


class NormExperts(ExpertGroup):
    """Weights of their own."""

    bases = ("member",)
    knows: ClassVar[Kinds] = {}

    def one(self, group: Group, linears: FfnLinears) -> GrownPart:
        return NormWeights(linears.hidden, bool(linears.biased))


class NormsSite(GroupSite):
    """One group of weights."""

    name = "norms"
    kind = GroupedNorm
    forms = ("full",)
    bases = ("member",)

    def linears(self, module: nn.Module, block: FfnBlock) -> FfnLinears:
        (width,) = module.get_parameter("weight").shape
        biased = {""} if getattr(module, "bias", None) is not None else set[str]()
        return FfnLinears(("",), "", {"": (width, width)}, frozenset(biased))

    def experts(self, group: Group, linears: FfnLinears) -> nn.Module:
        return NormExperts(group, linears)
