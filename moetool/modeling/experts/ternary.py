"""Experts of -1, 0 and 1 times a scale, at two bits a weight (MoTE). They stay packed in memory;
one matrix at a time is unpacked, or multiplied with as it lies.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.kernels import ternary, two_bits
from moetool.modeling.block import FfnLinears, GroupedBlock, Linear
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
        self.master: nn.Parameter | None = None

    def reset(self) -> None:
        from transformers import initialization as init

        init.constant_(self.weight_packed, _ZEROS)
        init.ones_(self.weight_scale)
        if self.bias is not None:
            init.zeros_(self.bias)

    def flaw(self, name: str, held: Tensor) -> tuple[str, str] | None:
        if name == "weight_packed" and bool((held & held >> 1 & _ZEROS).any()):
            return "codes 0, 1 and 2", "code 3, which stands for nothing"
        return super().flaw(name, held)

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

    def hold_master(self, given: Tensor | None) -> None:
        """Weights in full, in float32, of which the forward sees the rounded ones: `given` [out,
        in], where these round to what is packed, or else some that do.
        """
        codes = two_bits.unpacked(self.weight_packed, torch.float32)
        made = ternary.master(codes, self.weight_scale.detach(), self.group)
        if given is not None:
            rounded, own = ternary.absmean(given.detach().float(), self.group), self.weight_scale
            if torch.equal(rounded.codes.float(), codes) and torch.equal(rounded.scale, own):
                made = given.detach().float().clone()
        self.weight_scale.requires_grad_(False)
        self.master = nn.Parameter(made)

    @property
    def trains_masters(self) -> bool:  # type: ignore[override]
        return self.master is not None

    def written(self, state: dict[str, Any], at: str) -> None:
        if (held := state.pop(f"{at}master", None)) is not None:
            made = ternary.absmean(held, self.group)
            state[f"{at}weight_packed"] = two_bits.packed(made.codes)
            state[f"{at}weight_scale"] = made.scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """What `written` left of it brings new masters, if it is all there is."""
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]
        if self.trains_masters and f"{prefix}master" not in state_dict:
            missing: list[str] = args[2]
            if f"{prefix}weight_packed" in state_dict and f"{prefix}master" in missing:
                missing.remove(f"{prefix}master")
                self.hold_master(None)

    def forward(self, x: Tensor, once: two_bits.Once | None = None) -> Tensor:
        """x [rows, in]; `once` is shared by the linears of one expert."""
        if self.master is not None:
            x = two_bits.rounded(x) if self.rounds else x
            held = ternary.straight(self.master, self.group)
            return functional.linear(x, held.to(x.dtype), self.bias)
        if self.group or self._weight is not None:
            held = self.dense() if self._weight is None else self._weight
            x = two_bits.rounded(x) if self.rounds else x
            return functional.linear(x, held.to(x.dtype), self.bias)
        made = two_bits.product(x, self.weight_packed, self.weight_scale, self.rounds, once)
        return made if self.bias is None else made + self.bias

    def dense(self) -> Tensor:
        """[out, in], float32."""
        if self.master is not None:
            return ternary.straight(self.master, self.group)
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

    def swapped(self, block: GroupedBlock, expert: nn.Module) -> dict[str, Linear]:
        once = two_bits.Once()
        return {n: partial(part, once=once) for n, part in expert.named_children()}

    def dense(self, block: GroupedBlock, expert: int) -> dict[str, Tensor]:
        return dense_of(self[expert], block.linears.names)

    def hold_masters(self, block: GroupedBlock) -> bool:
        for expert in self:
            for name, part in expert.named_children():
                own = getattr(block, name, None)
                weight = None if own is None else own.weight
                if weight is not None and block.linears.transposed:
                    weight = weight.T
                assert isinstance(part, TernaryLinear)
                part.hold_master(weight)
        return True
