"""Low-rank experts under the FFN: y_e = W x + (alpha / rank) B A x, W shared by all (LLaVA-MoLE,
MixLoRA). W is multiplied with once, whatever the number of experts: of the input before they
differ, and of the weighted sum of what they give the last linear, which is linear.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from moetool.modeling.block import FfnLinears, GroupedBlock, Linear, Picked
from moetool.modeling.experts.group import Expert, ExpertGroup
from moetool.modeling.piece import GrownPart
from moetool.surgery.groups import Group


class LowRankLinear(GrownPart):
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

    def forward(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        """The change for rows x [rows, in], added to `base` [rows, out] if given."""
        low = x @ self.lora_A.T
        if base is None:
            return low @ self.lora_B.T * self.scale
        return torch.addmm(base, low, self.lora_B.T, alpha=self.scale)

    def dense(self, weight: Tensor) -> Tensor:
        """W [out, in] with the change."""
        return weight + self.scale * (self.lora_B @ self.lora_A)


class LoraExperts(ExpertGroup):
    """params: rank, alpha, and `targets`, the linears that have a change (all, where not said)."""

    name: ClassVar[str] = "lora"
    bases: ClassVar[tuple[str, ...]] = ("under",)
    needs: ClassVar[tuple[str, ...]] = ("rank", "alpha")
    knows: ClassVar[tuple[str, ...]] = ("targets",)

    def one(self, group: Group, linears: FfnLinears) -> Expert:
        rank, alpha = group.params["rank"], group.params["alpha"]
        made = partial(LowRankLinear, rank=rank, scale=alpha / rank)
        targets = group.params.get("targets") or linears.names
        return Expert(((n, made(linears.shapes[n])) for n in targets), {})

    def run(self, block: GroupedBlock, x: Tensor, picked: Picked) -> Tensor:
        lie, rows = block.linears, x[picked.token]
        into: dict[str, Linear] = {}
        for name in lie.into:
            linear = getattr(block, name)
            base = linear(rows) if picked.single else linear(x)[picked.token]
            into[name] = _given(self._changed(name, rows, base, picked))
        middle = picked.weighted(block.ffn(rows, into | {lie.out: _itself}))
        last = getattr(block, lie.out)
        if picked.single:
            made = picked.back(self._changed(lie.out, middle, last(middle), picked))
        else:
            made = last(picked.back(middle)) + picked.back(self._change(lie.out, middle, picked))
        if lie.out in lie.biased and not picked.sums:
            bias = last(middle.new_zeros(1, middle.shape[-1]))
            made = made + (picked.shares() - 1) * bias
        return made

    def _changed(self, name: str, rows: Tensor, base: Tensor, picked: Picked) -> Tensor:
        """`base` [rows, out] with each expert's change of its own rows."""
        if name not in self[0]._modules:
            return base
        runs = picked.runs
        return torch.cat([self._part(e, name)(rows[a:b], base[a:b]) for e, a, b in runs])

    def _change(self, name: str, rows: Tensor, picked: Picked) -> Tensor:
        """The changes alone."""
        if name not in self[0]._modules:
            return rows.new_zeros(len(rows), 1)
        return torch.cat([self._part(e, name)(rows[a:b]) for e, a, b in picked.runs])

    def _part(self, expert: int, name: str) -> nn.Module:
        return self[expert].get_submodule(name)

    def dense(self, block: GroupedBlock, expert: int) -> dict[str, Tensor]:
        made = {}
        for name in block.linears.names:
            held = getattr(block, name).weight
            weight = held.T if block.linears.transposed else held
            part = self[expert]._modules.get(name)
            made[name] = part.dense(weight) if isinstance(part, LowRankLinear) else weight
        return made


def _given(made: Tensor) -> Linear:
    """A linear that was computed before."""
    return lambda _: made


def _itself(x: Tensor) -> Tensor:
    return x
