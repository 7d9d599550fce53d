"""Experts that are the layer's own FFN and a change of a few bits a weight (DeRS, arXiv
2503.01359): `delta_packed` I32 [out, ceil(in * bits / 32)], whole numbers packed as packed_int has
them, and `delta_scale` [out, in / group].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.kernels import grid
from moetool.kernels.grid import Grid
from moetool.surgery.forms.compressed_tensors import scaled_by
from moetool.surgery.forms.form import Params
from moetool.surgery.forms.in_groups import Site, wrong
from moetool.surgery.forms.over_base import OverBase, sides
from moetool.surgery.spec import Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

MOST = 8  # bits
_SIGNS = (-1.0, 1.0)  # what one bit says


class KbitForm(OverBase):
    """params: {base: name of W, bits, group: inputs that share a scale, 0 for a row, transposed}; a
    config's group says {bits} and, where it is none of a row, {group}.
    """

    name: ClassVar[str] = "kbit"
    suffixes: ClassVar[tuple[str, ...]] = ("delta_packed", "delta_scale")
    must: ClassVar[Mapping[str, type]] = {"bits": int}
    may: ClassVar[Mapping[str, type]] = {"group": int, "linears": list}

    def check(self, params: Params) -> None:
        super().check(params)
        if not 1 <= params["bits"] <= MOST:
            raise wrong(self.name, "with `bits`", f"1 to {MOST}", params["bits"])
        if params.get("group", 0) < 0:
            raise wrong(self.name, "with `group`", "0 or more", params["group"])

    def change(self, target: Target, params: Params) -> tuple[Target, ...]:
        out, into = sides(target.shape, params["transposed"])
        stem, group = target.name.removesuffix(".weight"), params["group"]
        words = -(-into * params["bits"] // 32)
        if group and into % group:
            raise wrong(self.name, "with `group`", f"a divisor of {into}", group)
        scales = (out, into // group if group else 1)
        return (
            Target(f"{stem}.delta_packed", "I32", (out, words)),
            Target(f"{stem}.delta_scale", scaled_by(target.dtype), scales),
        )

    def said(self, site: Site, base: Stored, change: Sequence[Stored]) -> Params:
        params = site.group.params
        return {"bits": params["bits"], "group": params.get("group", 0)}

    def weights(self, matrix: Stored) -> dict[str, int]:
        assert matrix.parts is not None
        return {p.name: matrix.elements for p in matrix.parts.tensors[:2]}

    def added(self, parts: Sequence[Tensor], params: Params, width: int) -> Tensor:
        from moetool.kernels import packing, rounding

        packed, scale = parts
        codes = packing.codes(packed, params["bits"], width)
        found = rounding.Rounded(codes, scale.float())
        return rounding.values(found, levels(params["bits"], params["group"]))


def levels(bits: int, group: int, scale: str = "F32") -> Grid:
    """What a change of so many bits can be; of one bit, the signs."""
    if bits == 1:
        return Grid(_SIGNS, group, 1.0, scale)
    return grid.integers(bits, group, scale)
