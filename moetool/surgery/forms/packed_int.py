"""Integers of 1 to 8 bits as compressed-tensors packs them (`pack-quantized`): `weight_packed` I32
[out, ceil(in * bits / 32)], `weight_scale` [out, in / group] and `weight_shape` I64 [2].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.kernels import grid
from moetool.kernels.grid import Grid
from moetool.surgery.forms.compressed_tensors import (
    WEIGHT,
    CompressedTensors,
    scaled_by,
    weights,
)
from moetool.surgery.forms.form import Format, Params, Read
from moetool.surgery.spec import Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.kernels.rounding import Rounded

GROUPS = (128, 64, 32, 256, 16, 0)


def _format(bits: int, usual: int) -> Format:
    groups = (usual, *(g for g in GROUPS if g != usual))
    return Format(f"symmetric integers of {bits} bits", {"bits": bits, "group": usual}, groups)


class PackedInt(CompressedTensors):
    """params: {bits, group (0: one scale for a row), scale: dtype of the scales, columns: the input
    width where neither groups nor words say it}.
    """

    name: ClassVar[str] = "packed_int"
    kinds: ClassVar[tuple[str, ...]] = ("pack-quantized",)
    suffixes: ClassVar[tuple[str, ...]] = (".weight_packed", ".weight_scale", ".weight_shape")
    formats: ClassVar[Mapping[str, Format]] = {
        f"int{bits}": _format(bits, 64 if bits == 2 else 128) for bits in range(2, 9)
    }

    def settled(self, target: Target, params: Params) -> Params:
        return {"scale": scaled_by(target.dtype), **params}

    def weights_of(self, params: Params) -> JsonObject:
        group = params["group"]
        return weights(params["bits"], "int", "group" if group else "channel", group)

    def params_of(self, weights: JsonObject) -> Params | None:
        group = integer_group(weights)
        if group is None or not weights.get("symmetric", True):
            return None
        return {"bits": weights["num_bits"], "group": group}

    def settle(self, params: Params, parts: Sequence[Stored], read: Read | None) -> Params:
        """Between whole words lie some widths: without groups the matrix itself must say its own."""
        found = {**params, "scale": parts[1].dtype}
        if not params["group"] and read is not None and parts[2].dtype == "I64":
            columns = int.from_bytes(read(parts[2])[8:16], "little")
            if columns != parts[0].shape[-1] * 32 // params["bits"]:
                found["columns"] = columns
        return found

    @staticmethod
    def columns(packed: Tensor, scale: Tensor, params: Params) -> int:
        """The input width of a matrix."""
        whole = scale.shape[1] * params["group"] or packed.shape[1] * 32 // params["bits"]
        return int(params.get("columns") or whole)

    def shape_of(self, parts: Sequence[Stored], params: Params) -> Shape | None:
        packed, scale = parts[:2]
        if len(packed.shape) != 2 or len(scale.shape) != 2:
            return None
        columns = scale.shape[1] * params["group"] or packed.shape[1] * 32 // params["bits"]
        return packed.shape[0], params.get("columns") or columns

    def own(self, target: Target, params: Params) -> tuple[Target, ...]:
        (rows, columns), stem = target.shape, target.name.removesuffix(WEIGHT)
        words = -(-columns * params["bits"] // 32)
        groups = columns // params["group"] if params["group"] else 1
        return (
            Target(f"{stem}.weight_packed", "I32", (rows, words)),
            Target(f"{stem}.weight_scale", params.get("scale", "BF16"), (rows, groups)),
            Target(f"{stem}.weight_shape", "I64", (2,)),
        )

    def grid(self, shape: Shape, params: Params) -> Grid | None:
        return grid.integers(params["bits"], params["group"], params.get("scale", "BF16"))

    def pack(self, rounded: Rounded, params: Params) -> Sequence[Tensor]:
        import torch

        from moetool.kernels import packing

        codes = rounded.codes
        shape = torch.tensor(codes.shape, dtype=torch.int64)
        return [packing.words(codes, params["bits"]), rounded.scales, shape.to(codes.device)]

    def unpack(self, parts: Sequence[Tensor], params: Params) -> Rounded | None:
        from moetool.kernels import packing
        from moetool.kernels.rounding import Rounded

        packed, scale, shape = parts[:3]
        width = self.columns(packed, scale, params)
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
        assert unpacked is not None
        grid = self.grid(tuple(unpacked.codes.shape), params)
        assert grid is not None
        return rounding.values(unpacked, grid)


def integer_group(weights: JsonObject) -> int | None:
    """The group of integers with fixed scales by group or row (0); None for other weights."""
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
        return None
    return int(weights["group_size"]) if strategy == "group" else 0
