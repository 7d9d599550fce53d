"""Experts that are the FFN changed at a few places (DeRS, arXiv 2503.01359): the places stay, the
numbers are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.kernels import codec, delta
from moetool.modeling.experts.delta import AddedLinear, DeltaExperts, onto
from moetool.surgery.forms.sparse import columns, kept
from moetool.surgery.groups import Group
from moetool.surgery.strict import Kinds

_FEW = 512  # below one of so many, numbers are added one by one: 1.0 against 1.6 ms for 64 rows


class SparseLinear(AddedLinear):
    """`delta_values` [count], in rows by `delta_rows` int32 [out + 1] and in columns
    `delta_columns` int16 or int32 [count].
    """

    def __init__(self, shape: tuple[int, int], keep: float) -> None:
        super().__init__()
        out, self.width = shape
        count, short = kept(keep, shape), codec.torch_dtype(columns(self.width))
        self.few = count * _FEW <= out * self.width
        rows, places = (
            nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
            for size, dtype in ((out + 1, torch.int32), (count, short))
        )
        self.delta_rows, self.delta_columns = rows, places
        self.delta_values = nn.Parameter(torch.empty(count))

    def reset(self) -> None:
        """Zeros in the first places; `upcycle` draws others."""
        from transformers import initialization as init

        count, width = len(self.delta_values), self.width
        first = torch.arange(count)
        starts = torch.arange(len(self.delta_rows)).mul(width).clamp(max=count)
        init.copy_(self.delta_rows, starts.int())
        init.copy_(self.delta_columns, (first % width).to(self.delta_columns.dtype))
        init.zeros_(self.delta_values)

    def held(self) -> delta.Sparse:
        """What it adds, as kernels take it."""
        return delta.Sparse(self.delta_rows, self.delta_columns.int(), self.delta_values)

    def forward(self, x: Tensor, base: Tensor | None = None, over: bool = False) -> Tensor:
        held = self.held()
        if not self.few:
            made = functional.linear(x, delta.spread(held, self.width).to(x.dtype))
            return onto(base, made, over)
        made = x.index_select(1, held.columns) * held.values.to(x.dtype)
        total = x.new_zeros(len(x), len(held.rows) - 1) if base is None else base
        add = total.index_add_ if over or base is None else total.index_add
        return add(1, delta.owners(held), made)

    def dense(self, weight: Tensor) -> Tensor:
        return weight + delta.spread(self.held(), self.width)


class SparseExperts(DeltaExperts):
    """params: keep, the share of each linear's numbers that change."""

    name: ClassVar[str] = "sparse"
    needs: ClassVar[Kinds] = {"keep": float}
    knows: ClassVar[Kinds] = {}

    @classmethod
    def adding(cls, group: Group) -> Callable[[tuple[int, int]], AddedLinear]:
        return partial(SparseLinear, keep=group.params["keep"])
