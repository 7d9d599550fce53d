"""Integers with zero points as compressed-tensors packs them (`pack-quantized`, not symmetric):
what packed_int has, and `weight_zero_point` I32 [ceil(out * bits / 32), groups], packed along the
rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.surgery.forms.compressed_tensors import WEIGHT
from moetool.surgery.forms.form import Format, Params
from moetool.surgery.forms.packed_int import GROUPS, PackedInt, integer_group
from moetool.surgery.spec import Shape, Target

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.kernels.rounding import Rounded


class PackedAsym(PackedInt):
    """params: as packed_int has them."""

    name: ClassVar[str] = "packed_asym"
    suffixes: ClassVar[tuple[str, ...]] = (*PackedInt.suffixes, ".weight_zero_point")
    formats: ClassVar[Mapping[str, Format]] = {
        f"int{bits}-asym": Format(
            f"integers of {bits} bits with a zero point", {"bits": bits, "group": 128}, GROUPS
        )
        for bits in (4, 8)
    }

    def weights_of(self, params: Params) -> JsonObject:
        return super().weights_of(params) | {"symmetric": False, "zp_dtype": "torch.int8"}

    def params_of(self, weights: JsonObject) -> Params | None:
        group = integer_group(weights)
        if group is None or weights.get("symmetric", True):
            return None
        return {"bits": weights["num_bits"], "group": group}

    def own(self, target: Target, params: Params) -> tuple[Target, ...]:
        packed, scale, shape = super().own(target, params)
        words = -(-target.shape[0] * params["bits"] // 32)
        zero = target.name.removesuffix(WEIGHT) + ".weight_zero_point"
        return packed, scale, shape, Target(zero, "I32", (words, scale.shape[1]))

    def grid(self, shape: Shape, params: Params) -> None:
        return None  # zero points are more than a grid says

    def unpack(self, parts: Sequence[Tensor], params: Params) -> Rounded | None:
        return None

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        import torch

        from moetool.kernels import codec, packing, zeropoint

        self.refuse_static(params)
        bits, dtype = params["bits"], codec.torch_dtype(params.get("scale", "BF16"))
        made = zeropoint.nearest(matrix, bits, params["group"], dtype)
        zeros = packing.words(made.zeros.T, bits).T.contiguous()
        shape = torch.tensor(matrix.shape, dtype=torch.int64)
        return [packing.words(made.codes, bits), made.scales, shape.to(matrix.device), zeros]

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import packing, zeropoint

        packed, scale, _, zero = parts[:4]
        codes = packing.codes(packed, params["bits"], self.columns(packed, scale, params))
        zeros = packing.codes(zero.T.contiguous(), params["bits"], len(packed)).T
        return zeropoint.values(codes, scale, zeros)
