"""Experts that are the FFN and a change of a few bits a weight (DeRS, arXiv 2503.01359). They stay
packed in memory; one matrix at a time is unpacked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.kernels import packing, rounding
from moetool.modeling.experts.delta import AddedLinear, DeltaExperts, onto
from moetool.surgery.forms.kbit import levels
from moetool.surgery.groups import Group
from moetool.surgery.strict import Kinds


class KbitLinear(AddedLinear):
    """`delta_packed` int32 [out, words] and `delta_scale` [out, in / group]. Neither is trained."""

    def __init__(self, shape: tuple[int, int], bits: int, group: int) -> None:
        super().__init__()
        out, self.width = shape
        self.bits, self.grid = bits, levels(bits, group)
        words, groups = -(-self.width * bits // 32), self.width // group if group else 1
        packed = torch.empty(out, words, dtype=torch.int32)
        self.delta_packed = nn.Parameter(packed, requires_grad=False)
        self.delta_scale = nn.Parameter(torch.empty(out, groups), requires_grad=False)
        self._added: Tensor | None = None

    def reset(self) -> None:
        """No change."""
        from transformers import initialization as init

        init.zeros_(self.delta_packed)
        init.zeros_(self.delta_scale)

    def unpack(self, dtype: torch.dtype) -> None:
        """Beside the packed change, in full."""
        self._added = self.added().to(dtype)

    def added(self) -> Tensor:
        """[out, in], float32."""
        codes = packing.codes(self.delta_packed, self.bits, self.width)
        return rounding.values(rounding.Rounded(codes, self.delta_scale.float()), self.grid)

    def forward(self, x: Tensor, base: Tensor | None = None, over: bool = False) -> Tensor:
        held = self.added() if self._added is None else self._added
        made = functional.linear(x, held.to(x.dtype))
        return onto(base, made, over)

    def dense(self, weight: Tensor) -> Tensor:
        return weight + self.added()


class KbitExperts(DeltaExperts):
    """params: bits, and `group`, inputs that share a scale (a row, where not said)."""

    name: ClassVar[str] = "kbit"
    needs: ClassVar[Kinds] = {"bits": int}
    knows: ClassVar[Kinds] = {"group": int}

    @classmethod
    def adding(cls, group: Group) -> Callable[[tuple[int, int]], AddedLinear]:
        return partial(KbitLinear, bits=group.params["bits"], group=group.params.get("group", 0))
