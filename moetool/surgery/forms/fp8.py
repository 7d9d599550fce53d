"""fp8 as compressed-tensors stores it (`float-quantized`): `weight` E4M3 and `weight_scale`, one a
row, or one a matrix where others wrote it. Loaders round activations to fp8 too, a scale a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.kernels import grid
from moetool.kernels.grid import Grid
from moetool.surgery.forms.form import Format, Params
from moetool.surgery.forms.scaled import TOKEN, Scaled
from moetool.surgery.spec import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.kernels.rounding import Rounded


class Fp8(Scaled):
    """E4M3 times a scale (see `Scaled`)."""

    name: ClassVar[str] = "fp8"
    searched: ClassVar[bool] = False  # floats have as many levels at every size
    kinds: ClassVar[tuple[str, ...]] = ("float-quantized", "naive-quantized")
    dtype: ClassVar[str] = "F8_E4M3"
    type: ClassVar[str] = "float"
    formats: ClassVar[Mapping[str, Format]] = {
        "fp8": Format(
            "E4M3 with a scale a row; loaders round activations to fp8 as well",
            {"strategy": "channel", "activations": {"type": "float", **TOKEN}},
        )
    }

    def grid(self, shape: Shape, params: Params) -> Grid | None:
        if params["strategy"] != "channel":
            return None
        return grid.e4m3(0, params.get("scale", "BF16"))

    def pack(self, rounded: Rounded, params: Params) -> Sequence[Tensor]:
        from moetool.kernels import packing

        return [rounded.scales, packing.e4m3(rounded.codes)]

    def unpack(self, parts: Sequence[Tensor], params: Params) -> Rounded | None:
        from moetool.kernels.rounding import Rounded, fp8_codes

        scale, weight = parts[:2]
        if params["strategy"] != "channel":
            return None
        return Rounded(fp8_codes(weight), scale.float())

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        from moetool.kernels import blockscale, codec

        self.refuse_static(params)
        dtype = codec.torch_dtype(params.get("scale", "BF16"))
        if params["strategy"] == "channel":
            weight, scale = blockscale.encode_rows(matrix, dtype)
            return [scale, weight]
        one = (matrix.shape[0], matrix.shape[1])
        weight, scale = blockscale.encode_fp8(matrix, one, dtype)
        return [scale.reshape(params.get("of", (1,))), weight]
