"""Integers of 1 to 8 bits as compressed-tensors packs them (`pack-quantized`, weights only):
`weight_packed` I32 [out, ceil(in * bits / 32)], `weight_scale` [out, in / group] and
`weight_shape` I64 [2].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.kernels import grid
from moetool.kernels.grid import Grid
from moetool.surgery.forms.compressed_tensors import CompressedTensors, part, whole
from moetool.surgery.forms.form import Format, Params
from moetool.surgery.spec import InParts, Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.kernels.rounding import Rounded

_GROUPS = (128, 64, 32, 256, 16, 0)


def _format(bits: int, usual: int) -> Format:
    groups = (usual, *(g for g in _GROUPS if g != usual))
    return Format(f"symmetric integers of {bits} bits", {"bits": bits, "group": usual}, groups)


class PackedInt(CompressedTensors):
    """params: {bits, group} (0: one scale for a row)."""

    name: ClassVar[str] = "packed_int"
    kind: ClassVar[str] = "pack-quantized"
    lead: ClassVar[str] = ".weight_packed"
    formats: ClassVar[Mapping[str, Format]] = {
        f"int{bits}": _format(bits, 64 if bits == 2 else 128) for bits in range(2, 9)
    }

    def scheme(self, params: Params) -> JsonObject:
        group = params["group"]
        return {
            "weights": {
                "num_bits": params["bits"],
                "type": "int",
                "symmetric": True,
                "strategy": "group" if group else "channel",
                "group_size": group or None,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }

    def params_of(self, weights: JsonObject) -> Params | None:
        if weights.get("type") != "int" or not weights.get("symmetric", True):
            return None
        return {"bits": weights["num_bits"], "group": weights.get("group_size") or 0}

    def read(self, full: str, tensors: Mapping[str, Stored], params: Params, dtype: str) -> Stored:
        packed, scale, shape = (
            part(tensors, full, s) for s in (".weight_packed", ".weight_scale", ".weight_shape")
        )
        group, words = params["group"], packed.shape[1]
        width = scale.shape[1] * group if group else words * 32 // params["bits"]
        parts = InParts(self.name, (packed, scale, shape), params)
        return whole(self.name, full, dtype, (packed.shape[0], width), parts)

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        (rows, columns), stem = target.shape, target.name.removesuffix(".weight")
        words = -(-columns * params["bits"] // 32)
        groups = columns // params["group"] if params["group"] else 1
        return (
            Target(f"{stem}.weight_packed", "I32", (rows, words)),
            Target(f"{stem}.weight_scale", "BF16", (rows, groups)),
            Target(f"{stem}.weight_shape", "I64", (2,)),
        )

    def grid(self, shape: Shape, params: Params) -> Grid:
        return grid.integers(params["bits"], params["group"], "BF16")

    def pack(self, rounded: Rounded, params: Params) -> Sequence[Tensor]:
        import torch

        from moetool.kernels import packing

        codes, scales = rounded.codes, rounded.scales
        shape = torch.tensor(codes.shape, dtype=torch.int64)
        words = packing.words(codes, params["bits"])
        return [words, scales.to(torch.bfloat16), shape.to(codes.device)]

    def unpack(self, parts: Sequence[Tensor], params: Params) -> Rounded:
        from moetool.kernels import packing
        from moetool.kernels.rounding import Rounded

        packed, scale, shape = parts
        width = scale.shape[1] * params["group"] or packed.shape[1] * 32 // params["bits"]
        if not shape.is_meta and shape.tolist() != [len(packed), width]:
            raise MoetoolError(
                "a packed matrix says another shape than it has",
                expected=[len(packed), width],
                found=shape.tolist(),
                hint="the checkpoint is damaged: download it again",
            )
        return Rounded(packing.codes(packed, params["bits"], width), scale.float())

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import rounding

        unpacked = self.unpack(parts, params)
        return rounding.values(unpacked, self.grid(tuple(unpacked.codes.shape), params))
