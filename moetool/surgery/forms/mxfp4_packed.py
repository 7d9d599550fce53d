"""mxfp4 as compressed-tensors packs it (`mxfp4-pack-quantized`): `weight_packed` U8 [out, in / 2],
two E2M1 a byte, the lower half first, and `weight_scale` U8 [out, in / 32], the exponent + 127 of a
power of two. gpt-oss's own stacks are another form (mxfp4.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.kernels import grid
from moetool.kernels.grid import Grid
from moetool.surgery.forms.compressed_tensors import WEIGHT, CompressedTensors, weights
from moetool.surgery.forms.form import Format, Params
from moetool.surgery.spec import Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.kernels.rounding import Rounded

GROUP = 32
POWERS = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}


class Mxfp4Packed(CompressedTensors):
    """No params of its own."""

    name: ClassVar[str] = "mxfp4_packed"
    kinds: ClassVar[tuple[str, ...]] = ("mxfp4-pack-quantized",)
    suffixes: ClassVar[tuple[str, ...]] = (".weight_packed", ".weight_scale")
    formats: ClassVar[Mapping[str, Format]] = {
        "mxfp4": Format("E2M1 with a power of two for 32 neighbours")
    }

    def group(self, params: Params) -> int:
        return GROUP

    def weights_of(self, params: Params) -> JsonObject:
        return weights(4, "float", "group", GROUP) | POWERS

    def params_of(self, weights: JsonObject) -> Params | None:
        return {} if weights.get("group_size") == GROUP else None

    def shape_of(self, parts: Sequence[Stored], params: Params) -> Shape | None:
        packed = parts[0].shape
        return (packed[0], 2 * packed[1]) if len(packed) == 2 else None

    def own(self, target: Target, params: Params) -> tuple[Target, ...]:
        (rows, columns), stem = target.shape, target.name.removesuffix(WEIGHT)
        return (
            Target(f"{stem}.weight_packed", "U8", (rows, columns // 2)),
            Target(f"{stem}.weight_scale", "U8", (rows, columns // GROUP)),
        )

    def grid(self, shape: Shape, params: Params) -> Grid:
        return grid.e2m1(GROUP, "E8M0")

    def pack(self, rounded: Rounded, params: Params) -> Sequence[Tensor]:
        from moetool.kernels import packing

        return [packing.e2m1(rounded.codes), packing.exponents(rounded.scales)]

    def unpack(self, parts: Sequence[Tensor], params: Params) -> Rounded:
        from moetool.kernels import blockscale, packing
        from moetool.kernels.rounding import Rounded

        packed, scale = parts[:2]
        return Rounded(packing.e2m1_levels(packed), blockscale.powers(scale))

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import blockscale, packing

        packed, scale = parts[:2]
        values = packing.e2m1_values(packed)
        factors = blockscale.powers(scale)[:, :, None]
        return values.view(*scale.shape, GROUP).mul_(factors).view(values.shape)
