"""mxfp8 as compressed-tensors stores it (`mxfp8-quantized`): `weight` E4M3 and `weight_scale` U8
[out, in / 32], the exponent + 127 of a power of two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.kernels import grid
from moetool.kernels.grid import Grid
from moetool.surgery.forms.compressed_tensors import WEIGHT, CompressedTensors, weights
from moetool.surgery.forms.form import Format, Params
from moetool.surgery.forms.mxfp4_packed import GROUP, POWERS
from moetool.surgery.spec import Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.kernels.rounding import Rounded


class Mxfp8(CompressedTensors):
    """No params of its own."""

    name: ClassVar[str] = "mxfp8"
    searched: ClassVar[bool] = False  # floats have as many levels at every size
    kinds: ClassVar[tuple[str, ...]] = ("mxfp8-quantized",)
    suffixes: ClassVar[tuple[str, ...]] = (".weight_scale", ".weight")
    formats: ClassVar[Mapping[str, Format]] = {
        "mxfp8": Format("E4M3 with a power of two for 32 neighbours")
    }

    def group(self, params: Params) -> int:
        return GROUP

    def weights_of(self, params: Params) -> JsonObject:
        return weights(8, "float", "group", GROUP) | POWERS

    def params_of(self, weights: JsonObject) -> Params | None:
        return {} if weights.get("group_size") == GROUP else None

    def shape_of(self, parts: Sequence[Stored], params: Params) -> Shape | None:
        return parts[1].shape if len(parts[1].shape) == 2 else None

    def own(self, target: Target, params: Params) -> tuple[Target, ...]:
        rows, columns = target.shape
        scale = target.name.removesuffix(WEIGHT) + ".weight_scale"
        return (
            Target(scale, "U8", (rows, columns // GROUP)),
            Target(target.name, "F8_E4M3", target.shape),
        )

    def weights(self, matrix: Stored) -> dict[str, int]:
        assert matrix.parts is not None
        return {matrix.parts.tensors[1].name: matrix.elements}

    def grid(self, shape: Shape, params: Params) -> Grid:
        return replace(grid.e4m3(GROUP, "E8M0"), signed=False)

    def pack(self, rounded: Rounded, params: Params) -> Sequence[Tensor]:
        from moetool.kernels import packing

        return [packing.exponents(rounded.scales), packing.e4m3(rounded.codes)]

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        """By a cast, which keeps the sign of every zero as the library does."""
        import torch

        from moetool.kernels import packing, rounding

        self.refuse_static(params)
        scales = rounding.nearest(matrix, self.grid(tuple(matrix.shape), params)).scales
        groups = matrix.reshape(*scales.shape, GROUP) / scales.to(matrix.dtype)[..., None]
        weight = groups.clamp_(-448, 448).to(torch.float8_e4m3fn).reshape(matrix.shape)
        return [packing.exponents(scales), weight]

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import blockscale

        scale, weight = parts[:2]
        groups = blockscale.floats(weight).view(*scale.shape, GROUP)
        return groups.mul_(blockscale.powers(scale)[..., None]).view(weight.shape)
