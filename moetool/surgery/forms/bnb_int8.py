"""8-bit integers as bitsandbytes stores them (LLM.int8(), arXiv 2208.07339): `X.weight` I8, the
largest magnitude of each row (`X.SCB`, float32) and `X.weight_format` (U8, 0: rows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.kernels.grid import Grid
from moetool.surgery.forms.bitsandbytes import WEIGHT, BitsAndBytes, Seen, part
from moetool.surgery.forms.form import Format, Params, made_of
from moetool.surgery.spec import InParts, Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.kernels.rounding import Rounded

_MOST = 127
_ORDERS = ("row", "col32", "col_turing", "col_ampere")  # bitsandbytes.utils


class BnbInt8(BitsAndBytes):
    """Rows of integers; no params."""

    name: ClassVar[str] = "bnb_int8"
    lead: ClassVar[str] = ".SCB"
    computes: ClassVar[str] = "float16"
    formats: ClassVar[Mapping[str, Format]] = {
        "bnb-int8": Format("integers of 8 bits, a scale a row (bitsandbytes' LLM.int8())")
    }

    def said(self, params: Params, dtype: str) -> JsonObject:
        return {"load_in_8bit": True}

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        stem = target.name.removesuffix(WEIGHT)
        return (
            Target(target.name, "I8", target.shape),
            Target(f"{stem}.SCB", "F32", target.shape[:1]),
            Target(f"{stem}.weight_format", "U8", ()),
        )

    def read(self, full: str, tensors: Mapping[str, Stored], seen: Seen) -> Stored:
        wanted = self.parts(Target(full, "", tensors[full].shape if full in tensors else ()), {})
        weight, scales, order = (part(tensors, full, p.name, (p.dtype,)) for p in wanted)
        if len(weight.shape) != 2 or scales.shape != weight.shape[:1]:
            raise MoetoolError(
                "the scales of an int8 matrix do not fit its rows",
                tensor=scales.name,
                expected=f"one for each row of {list(weight.shape)}",
                found=list(scales.shape),
                hint="the checkpoint is incomplete: download it again",
            )
        _by_rows(order, seen)
        parts = InParts(self.name, (weight, scales, order))
        return made_of(self.name, full, seen.dtype, weight.shape, parts)

    def grid(self, shape: Shape, params: Params) -> Grid:
        levels = tuple(map(float, range(-_MOST, _MOST + 1)))
        return Grid(levels, 0, _MOST, "F32", signed=False)

    def pack(self, rounded: Rounded, params: Params) -> Sequence[Tensor]:
        import torch

        codes = (rounded.codes.short() - _MOST).to(torch.int8)
        return [codes, rounded.scales[:, 0] * _MOST, codes.new_zeros((), dtype=torch.uint8)]

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        import torch

        from moetool.kernels import bnb

        made = bnb.int8(matrix)
        if not (made.scales.is_meta or bool(made.scales.isfinite().all())):
            raise MoetoolError(
                "bnb-int8 computes in half precision, which does not hold a weight of this matrix",
                expected="weights up to 65504",
                found=float(matrix.abs().max()),
                hint="ask for int8, or leave the matrix full with --plan",
            )
        return [made.codes, made.scales, made.codes.new_zeros((), dtype=torch.uint8)]

    def unpack(self, parts: Sequence[Tensor], params: Params) -> Rounded:
        import torch

        from moetool.kernels.rounding import Rounded

        codes, most = parts[:2]
        return Rounded((codes.short() + _MOST).to(torch.uint8), (most / _MOST)[:, None])

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import bnb

        return bnb.from_int8(*parts[:2])


def _by_rows(order: Stored, seen: Seen) -> None:
    """Refuse integers in an order for some GPU's kernels, which old releases stored."""
    said = seen.read(order) if seen.read else b""
    if any(said):
        known = _ORDERS[said[0]] if said[0] < len(_ORDERS) else "no order of bitsandbytes"
        raise MoetoolError(
            "an int8 matrix does not lie in rows",
            tensor=order.name,
            expected="weight_format 0 (row)",
            found=f"{said[0]} ({known})",
            hint="load and save the model with a current bitsandbytes",
        )
