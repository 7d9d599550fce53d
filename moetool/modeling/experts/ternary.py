"""Experts of -1, 0 and 1 times a scale, at two bits a weight (MoTE). They stay packed in memory;
one matrix at a time is unpacked, or multiplied with as it lies.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.kernels import two_bits
from moetool.modeling.block import FfnLinears, GroupedBlock
from moetool.modeling.experts.group import ExpertGroup, dense_of
from moetool.modeling.piece import GrownPart
from moetool.surgery.strict import Kinds

_ZEROS = 0b01010101  # a byte of four codes 0
INT8 = "int8"


class TernaryLinear(GrownPart):
    """`weight_packed` uint8 [out, in / 4]; `weight_scale` float32 [1], or [out, in / group]; `bias`
    where the family has one.
    """

    def __init__(self, params: JsonObject, linears: FfnLinears, name: str) -> None:
        super().__init__()
        out, into = linears.shapes[name]
        self.group, self.rounds = params.get("group") or 0, params.get("activations") == INT8
        packed = torch.empty(out, into // two_bits.CODES, dtype=torch.uint8)
        self.weight_packed = nn.Parameter(packed, requires_grad=False)
        scales = (out, into // self.group) if self.group else (1,)
        self.weight_scale = nn.Parameter(torch.empty(scales, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out)) if name in linears.biased else None
        self._weight: Tensor | None = None

    def reset(self) -> None:
        from transformers import initialization as init

        init.constant_(self.weight_packed, _ZEROS)
        init.ones_(self.weight_scale)
        if self.bias is not None:
            init.zeros_(self.bias)

    def unpack(self, dtype: torch.dtype) -> None:
        """Beside the packed weights: eight times their memory or more, and the speed of experts in
        full.
        """
        if self.weight_packed.is_meta:
            raise MoetoolError(
                "packed experts that are on disk cannot be unpacked once for all",
                expected="every expert in memory",
                found=f"{tuple(self.weight_packed.shape)} on the meta device",
                hint="load with unpack='use', or without offloading to disk",
            )
        self._weight = self.dense().detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.group or self._weight is not None:
            held = self.dense() if self._weight is None else self._weight
            x = two_bits.rounded(x) if self.rounds else x
            return functional.linear(x, held.to(x.dtype), self.bias)
        made = two_bits.product(x, self.weight_packed, self.weight_scale, self.rounds)
        return made if self.bias is None else made + self.bias

    def dense(self) -> Tensor:
        """[out, in], float32."""
        codes = two_bits.unpacked(self.weight_packed, torch.float32)
        if not self.group:
            return codes * self.weight_scale
        groups = codes.view(len(codes), -1, self.group)
        return (groups * self.weight_scale[..., None]).view(codes.shape)


class TernaryExperts(ExpertGroup):
    """params: group (0: one scale a matrix), activations ("int8": rounded, one scale a token),
    output_scale.
    """

    name: ClassVar[str] = "ternary"
    knows: ClassVar[Kinds] = {
        "group": int,
        "activations": ("float", INT8),
        "output_scale": bool,
    }

    def part(self, params: JsonObject, linears: FfnLinears, name: str) -> nn.Module:
        return TernaryLinear(params, linears, name)

    def dense(self, block: GroupedBlock, expert: int) -> dict[str, Tensor]:
        return dense_of(self[expert], block.linears.names)
