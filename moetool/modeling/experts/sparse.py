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

# One by one, numbers cost their count for each row of input; spread out, they cost a matrix once.
# CPU seconds are even where count x rows is a quarter of the matrix; more rows than _ROWS change
# nothing, for then the product with the matrix costs as much as spreading it. Measured in
# tests/bench/measured.md, "What forms of experts cost".
_SPREAD, _ROWS = 4, 128


class SparseLinear(AddedLinear):
    """`delta_values` [count], in rows by `delta_rows` int32 [out + 1] and in columns
    `delta_columns` int16 or int32 [count].
    """

    def __init__(self, shape: tuple[int, int], keep: float) -> None:
        super().__init__()
        out, self.width = shape
        count, short = kept(keep, shape), codec.torch_dtype(columns(self.width))
        rows, places = (
            nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
            for size, dtype in ((out + 1, torch.int32), (count, short))
        )
        self.delta_rows, self.delta_columns = rows, places
        self.delta_values = nn.Parameter(torch.empty(count))

    def flaw(self, name: str, held: Tensor) -> tuple[str, str] | None:
        if name not in ("delta_rows", "delta_columns"):
            return super().flaw(name, held)
        least, most = (int(one) for one in held.aminmax())
        bound = self.width - 1 if name == "delta_columns" else len(self.delta_values)
        if name == "delta_rows":  # they begin and end there, and ascend
            right = [int(held[0]), int(held[-1])] == [0, bound] and bool((held.diff() >= 0).all())
        else:
            right = least >= 0 and most <= bound
        return None if right else (f"numbers from 0 to {bound}", f"{least} to {most}")

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
        return self.added(x, base, over, self.spreads(len(x)))

    def spreads(self, rows: int) -> bool:
        """Whether the change is made a matrix for so many rows of input, as it is cheaper."""
        one_by_one = _SPREAD * len(self.delta_values) * min(rows, _ROWS)
        return one_by_one > (len(self.delta_rows) - 1) * self.width

    def added(self, x: Tensor, base: Tensor | None, over: bool, spread: bool) -> Tensor:
        """As `forward`, in one of the two ways."""
        held = self.held()
        if spread:
            made = functional.linear(x, delta.spread(held, self.width).to(x.dtype))
            return onto(base, made, over)
        made = x.index_select(1, held.columns) * held.values.to(x.dtype)
        total = x.new_zeros(len(x), len(held.rows) - 1) if base is None else base
        add = total.index_add_ if over or base is None else total.index_add
        return add(1, delta.owners(held), made.to(total.dtype))  # autocast makes two of them

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
