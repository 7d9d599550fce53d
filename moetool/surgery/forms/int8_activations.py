"""Integers of 8 bits for products of integers (W8A8; compressed-tensors' `int-quantized`): `weight`
I8 and `weight_scale`, one a row. Loaders round activations to 8 bits, a scale a token.
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


class Int8Activations(Scaled):
    """Signed bytes times a scale (see `Scaled`)."""

    name: ClassVar[str] = "int8_activations"
    kinds: ClassVar[tuple[str, ...]] = ("int-quantized", "naive-quantized")
    dtype: ClassVar[str] = "I8"
    type: ClassVar[str] = "int"
    formats: ClassVar[Mapping[str, Format]] = {
        "w8a8": Format(
            "integers of 8 bits with a scale a row; loaders round activations to 8 bits as well",
            {"strategy": "channel", "activations": {"type": "int", **TOKEN}},
        )
    }

    def grid(self, shape: Shape, params: Params) -> Grid | None:
        if params["strategy"] != "channel":
            return None
        return grid.integers(8, 0, params.get("scale", "BF16"))

    def pack(self, rounded: Rounded, params: Params) -> Sequence[Tensor]:
        import torch

        return [rounded.scales, (rounded.codes ^ 0x80).view(torch.int8)]

    def unpack(self, parts: Sequence[Tensor], params: Params) -> Rounded | None:
        import torch

        from moetool.kernels.rounding import Rounded

        scale, weight = parts[:2]
        if params["strategy"] != "channel":
            return None
        return Rounded(weight.view(torch.uint8) ^ 0x80, scale.float())
