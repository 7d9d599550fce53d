"""The norms of a layer: experts are weights of a norm (Mixture-of-Transformers, arXiv 2411.04996)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from moetool.modeling.block import FfnLinears, Grouped, Swapped
from moetool.modeling.experts.group import ExpertGroup
from moetool.modeling.piece import GrownPart
from moetool.modeling.sites.site import GroupSite, wrong
from moetool.surgery.ffn import TURNED, FfnBlock
from moetool.surgery.groups import Group
from moetool.surgery.strict import Kinds

_TOKENS = 3  # axes of what holds tokens: batch, length, width


class GroupedNorm(Grouped):
    """A norm with one group of experts. `heads`: whether it sees each head of a token by itself
    (surgery/ffn.py).
    """

    heads: str = ""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., width] -> the same, each token by the weights of its experts."""
        if self.heads == TURNED:  # [batch, heads, length, width]
            return self._each(hidden_states.transpose(1, 2)).transpose(1, 2)
        return self._each(hidden_states)

    def _each(self, x: Tensor) -> Tensor:
        """[batch, length, ..., width], by the experts of each token."""
        group, law = self.held[0]
        tokens = x.flatten(-2) if self.heads and x.dim() > _TOKENS else x
        rows = tokens.reshape(-1, tokens.shape[-1])
        picked = self.picked(group, law, rows)
        made = picked.each(picked.rows(rows), partial(self._by, group, x.shape[-1]))
        return picked.back(picked.weighted(made)).view(x.shape)

    def _by(self, group: Group, width: int, choice: int, rows: Tensor) -> Tensor:
        """The stock norm of rows, a head's width each, with the weights behind a choice; the first
        are its own.
        """
        heads, run = rows.view(len(rows), -1, width), self
        if choice:
            expert = self.get_submodule(group.expert(choice - 1))
            run = Swapped(self, dict(expert.named_parameters()))  # type: ignore[assignment]
        made: Tensor = self.stock.forward(run, heads)
        return made.reshape(rows.shape)


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
        made = NormExperts(group, linears)
        if group.router_tensors:
            raise wrong("a router at a norm, of whose weights a token has one set", "none", "one")
        return made

    def grow(self, module: nn.Module, block: FfnBlock, groups: Sequence[Group]) -> None:
        super().grow(module, block, groups)
        assert isinstance(module, GroupedNorm)
        module.heads = block.heads
