"""Experts that are parts of what is there already: they have no tensors of their own."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.modeling.block import FfnLinears, GroupedBlock, Linear, Picked
from moetool.modeling.experts.group import Expert, ExpertGroup
from moetool.surgery.groups import PART, Group
from moetool.surgery.strict import Kinds


class PartExperts(ExpertGroup):
    """params: shared, how many of the parts always work; they come first. In an FFN a part is
    neurons that lie one after the other; a bias of what comes out counts once, for no part.
    """

    name: ClassVar[str] = PART
    bases: ClassVar[tuple[str, ...]] = ("under",)
    sites: ClassVar[tuple[str, ...]] = ("ffn", "heads")
    knows: ClassVar[Kinds] = {"shared": int}

    def __init__(self, group: Group, linears: FfnLinears) -> None:
        super().__init__(group, linears)
        self.shared = int(group.params.get("shared", 0))

    def one(self, group: Group, linears: FfnLinears) -> Expert:
        return Expert((), {})

    def mixed(self, block: GroupedBlock, x: Tensor, picked: Picked, scale: float) -> Tensor:
        if picked.weight is None and picked.k == len(self) and scale == 1.0:  # every part, once
            return block.own_ffn(x)
        if not _plain(block):
            routed = picked.dense(len(self), x) * scale
            return self._weighted(
                block, x, torch.cat((x.new_ones(len(x), self.shared), routed), -1)
            )
        made = super().mixed(block, x, picked, scale)
        if self.shared or block.linears.out in block.linears.biased:
            made = made + self._neurons(block, x, 0, self.shared, once=True)
        return made

    def of(self, block: GroupedBlock, choice: int, rows: Tensor) -> Tensor:
        return self._neurons(block, rows, self.shared + choice, self.shared + choice + 1)

    def _neurons(
        self, block: GroupedBlock, x: Tensor, first: int, last: int, once: bool = False
    ) -> Tensor:
        """What the parts from `first` up to `last` give, with the bias of the output where that is
        to count.
        """
        lie = block.linears
        width = lie.shapes[lie.out][1]
        each = width // (self.shared + len(self))
        start, stop = first * each, last * each

        def rows(held: Tensor) -> Tensor:
            cut = [
                half[start:stop] for half in torch.split(held, width)
            ]  # gate and up, in one or not
            return cut[0] if len(cut) == 1 else torch.cat(cut)

        swapped: dict[str, Linear] = {}
        for name in lie.names:
            linear = getattr(block, name)
            weight = linear.weight.T if lie.transposed else linear.weight
            bias = linear.bias if name in lie.biased else None
            if name == lie.out:
                held = (weight[:, start:stop], bias if once else None)
            else:
                held = (rows(weight), None if bias is None else rows(bias))
            swapped[name] = partial(_linear, *held)
        return block.own_ffn(x, swapped)

    def _weighted(self, block: GroupedBlock, x: Tensor, weights: Tensor) -> Tensor:
        """The whole FFN, its neurons weighted by those of their parts [tokens, parts]."""
        last = block.linears.out

        def weighted(h: Tensor) -> Tensor:
            each = h.shape[-1] // weights.shape[-1]
            made: Tensor = getattr(block, last)(h * weights.repeat_interleave(each, -1))
            return made

        return block.own_ffn(x, {last: weighted})


def _plain(block: GroupedBlock) -> bool:
    """Whether its linears are weights and biases and no more: not where these are packed, have an
    adapter or lie elsewhere until they run.
    """
    from transformers.pytorch_utils import Conv1D

    every = [getattr(block, name) for name in block.linears.names]
    return all(type(one) in (nn.Linear, Conv1D) and not one.weight.is_meta for one in every)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return functional.linear(x, weight, bias)
