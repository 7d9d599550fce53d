"""Tables of 16 levels as bitsandbytes stores them: `X.weight` U8 [weights / 2, 1], a float32 scale
for each 64 weights (`.absmax`), the table (`.quant_map`) and, as bytes of JSON, what a loader must
know (`.quant_state.bitsandbytes__nf4`): the shape among it, which no header has.

With double quantization `.absmax` is U8 and has scales of its own (`.nested_absmax`,
`.nested_quant_map`); the mean taken off before stands in the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite, prod
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.kernels import grid
from moetool.kernels.grid import Grid
from moetool.surgery.forms.bitsandbytes import BitsAndBytes, Seen, part
from moetool.surgery.forms.form import Format, Params, made_of
from moetool.surgery.spec import InParts, Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.kernels.rounding import Rounded

BLOCK, _NESTED = 64, 256
_LONGEST = 4096  # bytes of JSON that are read
_NUMBER = 24  # characters that any float32 takes in JSON
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_STATE = ".quant_state.bitsandbytes__"


class Bnb4Bit(BitsAndBytes):
    """params: {double: whether scales are quantized again} and, of one matrix, {dtype: what a
    loader computes in; block: weights that share a scale, 64 without it}.
    """

    order: ClassVar[Sequence[int]] = ()  # the code of each level

    def said(self, params: Params, dtype: str) -> JsonObject:
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": params["double"],
            "bnb_4bit_compute_dtype": _DTYPES[dtype],
        }

    def settled(self, target: Target, params: Params) -> Params:
        return {**params, "dtype": target.dtype if target.dtype in _DTYPES else "F32"}

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        name, count = target.name, prod(target.shape)
        blocks = -(-count // params.get("block", BLOCK))
        scales = [Target(f"{name}.absmax", "F32", (blocks,))]
        if params["double"]:
            scales = [
                Target(f"{name}.absmax", "U8", (blocks,)),
                Target(f"{name}.nested_absmax", "F32", (-(-blocks // _NESTED),)),
                Target(f"{name}.nested_quant_map", "F32", (256,)),
            ]
        state = len(self._state(target.shape, params))
        return (
            Target(name, "U8", (count // 2, 1)),
            Target(f"{name}.quant_map", "F32", (16,)),
            Target(f"{name}{_STATE}{self.name}", "U8", (state,)),
            *scales,
        )

    def _state(self, shape: Shape, params: Params, offset: float = 0.0) -> bytes:
        """The JSON that bitsandbytes would write, spaces behind it where a number may be longer."""
        said: JsonObject = {
            "quant_type": self.name,
            "blocksize": params.get("block", BLOCK),
            "dtype": _DTYPES[params.get("dtype", "BF16")],
            "shape": list(shape),
        }
        if not params["double"]:
            return json.dumps(said).encode()
        said |= {"nested_blocksize": _NESTED, "nested_dtype": "float32", "nested_offset": offset}
        missing = _NUMBER - len(repr(offset))
        return json.dumps(said).encode() + b" " * missing

    def read(self, full: str, tensors: Mapping[str, Stored], seen: Seen) -> Stored:
        weight = part(tensors, full, full, ("U8",))
        table = part(tensors, full, f"{full}.quant_map", ("F32",))
        state = part(tensors, full, f"{full}{_STATE}{self.name}", ("U8",))
        scales = [part(tensors, full, f"{full}.absmax", ("F32", "U8"))]
        double = scales[0].dtype == "U8"
        if double:
            nested = ("nested_absmax", "nested_quant_map")
            scales += [part(tensors, full, f"{full}.{name}", ("F32",)) for name in nested]
        shape: Shape = (2 * weight.elements, 1)
        params: Params = {"double": double}
        if seen.read is not None:
            said = _parsed(state, seen.read(state) if state.elements <= _LONGEST else b"")
            shape = said.pop("shape")
            params |= said
        dtype = params.get("dtype", seen.dtype)
        lying = (weight, table, state, *scales)
        wanted = self.parts(Target(full, dtype, shape), params)
        for mine, theirs in zip(wanted, lying, strict=True):
            if seen.read is not None and mine.shape != theirs.shape and theirs is not state:
                raise MoetoolError(
                    "a part of a matrix does not fit its shape",
                    tensor=theirs.name,
                    expected=f"{list(mine.shape)} for {list(shape)}",
                    found=list(theirs.shape),
                    hint="the checkpoint is incomplete: download it again",
                )
        return made_of(self.name, full, dtype, shape, InParts(self.name, lying, params))

    def misfit(self, target: Target, params: Params) -> str:
        block = params.get("block", BLOCK)
        if len(target.shape) == 2 and target.shape[1] % block:
            return (
                f"its input width {target.shape[1]} is no multiple of {block}, and bitsandbytes "
                "decodes such a matrix wrongly on CPUs with AVX-512"
            )
        return super().misfit(target, params)

    def grid(self, shape: Shape, params: Params) -> Grid:
        table = {"nf4": grid.nf4, "fp4": grid.fp4}[self.name]
        return replace(table(params.get("block", BLOCK)), signed=not params["double"])

    def pack(self, rounded: Rounded, params: Params) -> Sequence[Tensor]:
        import torch

        from moetool.kernels import bnb

        device, scales, offset = rounded.codes.device, rounded.scales.reshape(-1), 0.0
        order = torch.tensor(self.order, dtype=torch.uint8, device=device)
        table = torch.empty(16, device=device)
        table[order.long()] = (
            torch.tensor(self.grid((), params).levels, device=device) + 0.0
        )  # no -0.0
        lying = [scales]
        if params["double"]:
            nested = bnb.nest(scales)
            offset = 0.0 if nested.offset.is_meta else float(nested.offset)
            lying = [nested.codes, nested.scales, bnb.dynamic_map().to(device, copy=True)]
        state = self._state(tuple(rounded.codes.shape), params, offset)
        codes = order[rounded.codes.int()] if self.order[1] != 1 else rounded.codes
        packed = bnb.pack(codes)
        return [packed, table, torch.tensor(list(state), dtype=torch.uint8, device=device), *lying]

    def unpack(self, parts: Sequence[Tensor], params: Params) -> Rounded | None:
        """None with double quantization: weights were rounded under scales that it rounds again."""
        import torch

        from moetool.kernels.rounding import Rounded

        packed, _, state, *scales = parts
        if params["double"]:
            return None
        rows, columns = _said(state)["shape"]
        codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], -1).view(rows, columns)
        if self.order[1] != 1:
            codes = codes.new_tensor(sorted(range(16), key=self.order.__getitem__))[codes.int()]
        return Rounded(codes, self.scales(state, *scales).view(rows, -1))

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import bnb

        packed, table, state, *scales = parts
        shape = [-1] if state.is_meta else _said(state)["shape"]
        block = params.get("block", BLOCK)
        return bnb.unpack(packed, self.scales(state, *scales), table, block).reshape(shape)

    def scales(self, state: Tensor, absmax: Tensor, *nested: Tensor) -> Tensor:
        """The float32 scales [blocks] of a matrix, from its parts of these names."""
        from moetool.kernels import bnb

        if not nested:
            return absmax
        most, table = nested
        offset = most.new_tensor(0.0 if state.is_meta else _said(state)["nested_offset"])
        return bnb.unnest(bnb.Nested(absmax, most, offset), table)


def _said(state: Tensor) -> Params:
    made: Params = json.loads(bytes(state.tolist()))
    return made


class Nf4(Bnb4Bit):
    """The quantiles of a normal distribution."""

    name: ClassVar[str] = "nf4"
    lead: ClassVar[str] = f".weight{_STATE}nf4"
    order: ClassVar[Sequence[int]] = range(16)
    formats: ClassVar[Mapping[str, Format]] = {
        "nf4": Format("QLoRA's table of 4 bits in blocks of 64 (bitsandbytes)", {"double": False}),
        "nf4-double": Format("nf4 with its scales in 8 bits", {"double": True}),
    }


class Fp4(Bnb4Bit):
    """Floats of a sign, two bits of exponent and one of mantissa."""

    name: ClassVar[str] = "fp4"
    lead: ClassVar[str] = f".weight{_STATE}fp4"
    order: ClassVar[Sequence[int]] = grid.FP4_CODES
    formats: ClassVar[Mapping[str, Format]] = {
        "fp4": Format("floats of 4 bits in blocks of 64 (bitsandbytes)", {"double": False}),
        "fp4-double": Format("fp4 with its scales in 8 bits", {"double": True}),
    }


def _parsed(state: Stored, data: bytes) -> Params:
    """shape, dtype and block of a matrix, as bitsandbytes wrote them; MoetoolError for anything
    else.
    """
    try:
        said = json.loads(data)
        names = {v: k for k, v in _DTYPES.items()}
        shape, block = tuple(said["shape"]), said["blocksize"]
        good = all(type(n) is int and n > 0 for n in (*shape, block)) and len(shape) == 2
        offset = float(said.get("nested_offset", 0.0))
        nested = said.get("nested_blocksize", _NESTED) == _NESTED
        if good and nested and isfinite(offset) and block >= 2:
            return {"shape": shape, "dtype": names[said["dtype"]], "block": block}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise MoetoolError(
        "what a file says of a 4-bit matrix means nothing",
        tensor=state.name,
        expected="JSON with shape, dtype and blocksize",
        found=data[:80].decode(errors="replace") or f"{state.elements} bytes",
        hint="the checkpoint is damaged: download it again",
    )
