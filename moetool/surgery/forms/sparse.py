"""Experts that are the layer's own FFN changed at a few places (DeRS, arXiv 2503.01359):
`delta_values` [count], `delta_columns` I16 [count] (I32 where the input is wider than 32,768) and
`delta_rows` I32 [out + 1], which says where the numbers of each row begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, ClassVar

from moetool.surgery.forms.form import Params
from moetool.surgery.forms.in_groups import Site, wrong
from moetool.surgery.forms.over_base import OverBase, sides
from moetool.surgery.spec import Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

_SHORT = 1 << 15  # columns that 16 bits with a sign can name


class SparseForm(OverBase):
    """params: {base: name of W, keep: the share of its numbers that change, transposed}; a config's
    group says {keep}.
    """

    name: ClassVar[str] = "sparse"
    suffixes: ClassVar[tuple[str, ...]] = ("delta_rows", "delta_columns", "delta_values")
    must: ClassVar[Mapping[str, type]] = {"keep": float}
    may: ClassVar[Mapping[str, type]] = {"linears": list}

    def check(self, params: Params) -> None:
        super().check(params)
        if not 0 < params["keep"] <= 1:
            raise wrong(self.name, "with `keep`", "above 0, at most 1", params["keep"])

    def change(self, target: Target, params: Params) -> tuple[Target, ...]:
        out, into = sides(target.shape, params["transposed"])
        stem, count = target.name.removesuffix(".weight"), kept(params["keep"], target.shape)
        return (
            Target(f"{stem}.delta_rows", "I32", (out + 1,)),
            Target(f"{stem}.delta_columns", columns(into), (count,)),
            Target(f"{stem}.delta_values", target.dtype, (count,)),
        )

    def said(self, site: Site, base: Stored, change: Sequence[Stored]) -> Params:
        return {"keep": site.group.params["keep"]}

    def whole_numbers(self, part: str) -> bool:
        return part.endswith(self.suffixes[:2])

    def flaw(self, part: Stored, data: bytes, matrix: Stored) -> tuple[str, str] | None:
        import numpy as np

        assert matrix.parts is not None
        numbers = np.frombuffer(data, np.int16 if part.dtype == "I16" else np.int32)
        params = matrix.parts.params
        most = sides(matrix.shape, params["transposed"])[1] - 1
        right = numbers.min(initial=0) >= 0 and numbers.max(initial=0) <= most
        wanted = f"columns 0 to {most}"
        if part.name.endswith(self.suffixes[0]):
            count = kept(params["keep"], matrix.shape)
            right = [*numbers[[0, -1]]] == [0, count] and bool((np.diff(numbers) >= 0).all())
            wanted = f"ascending numbers from 0 to {count}"
        return None if right else (wanted, f"{numbers.min()} to {numbers.max()}")

    def added(self, parts: Sequence[Tensor], params: Params, width: int) -> Tensor:
        from moetool.kernels import delta

        rows, columns, values = parts
        return delta.spread(delta.Sparse(rows, columns, values.float()), width)


def kept(share: float, shape: Shape) -> int:
    """How many numbers of a matrix a share of them is, one at least."""
    return max(1, round(share * prod(shape)))


def columns(into: int) -> str:
    """The dtype of column numbers below `into`."""
    return "I16" if into <= _SHORT else "I32"
