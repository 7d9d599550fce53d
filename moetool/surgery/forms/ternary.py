"""Experts of -1, 0 and 1 times a scale, at two bits a weight (MoTE, arXiv 2506.14435):
`weight_packed` U8 [out, in / 4], four codes a byte along the input, and `weight_scale` F32 [1] or
[out, in / group].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.errors import MoetoolError
from moetool.surgery.forms.form import Params
from moetool.surgery.forms.in_groups import InGroups, Site, part
from moetool.surgery.spec import InParts, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

CODES = 4  # a byte
_LOW = 0b01010101  # the lower bit of each
PARTS = ("weight_packed", "weight_scale")


class TernaryForm(InGroups):
    """params: {group: inputs that share a scale, 0 for a whole matrix; transposed: whether the
    family's matrices lie as [in, out]}; a config's group says {group, activations, output_scale}.
    """

    name: ClassVar[str] = "ternary"
    alone: ClassVar[bool] = True
    fits_in: ClassVar[str] = "F16"  # its scales are rounded to that when they are made
    may: ClassVar[Mapping[str, type]] = {"group": int, "activations": str, "output_scale": bool}

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        one, other = target.shape
        out, into = (other, one) if params["transposed"] else (one, other)
        stem, group = target.name.removesuffix(".weight"), params["group"]
        return (
            Target(f"{stem}.weight_packed", "U8", (out, into // CODES)),
            Target(f"{stem}.weight_scale", "F32", (out, into // group) if group else (1,)),
        )

    def parts_of(self, tensors: Mapping[str, Stored], site: Site) -> InParts:
        packed, scale = (part(tensors, site, name) for name in PARTS)
        group = site.group.params.get("group", 0)
        params = {"group": group, "transposed": site.linear.transposed}
        found = InParts(self.name, (packed, scale), params)
        whole = Target(site.full, "F32", self.shape(found, None))
        for stored, wanted in zip((packed, scale), self.parts(whole, params), strict=True):
            if (stored.dtype, stored.shape) != (wanted.dtype, wanted.shape):
                raise MoetoolError(
                    "a part of a ternary matrix is not what the config says",
                    tensor=stored.name,
                    expected=f"{wanted.dtype} {list(wanted.shape)}",
                    found=f"{stored.dtype} {list(stored.shape)}",
                    hint="config.json and weights are not of the same model",
                )
        return found

    def shape(self, parts: InParts, base: Stored | None) -> tuple[int, ...]:
        packed = parts.tensors[0].shape
        if len(packed) != 2:
            return packed
        out, into = packed[0], packed[1] * CODES
        return (into, out) if parts.params["transposed"] else (out, into)

    def whole_numbers(self, part: str) -> bool:
        return part.endswith(PARTS[0])

    def flaw(self, part: Stored, data: bytes, matrix: Stored) -> tuple[str, str] | None:
        import numpy as np

        codes = np.frombuffer(data, np.uint8)
        undefined = codes & codes >> 1 & _LOW  # both bits of a code
        return ("codes 0, 1 and 2", "code 3, which stands for nothing") if undefined.any() else None

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        import torch

        from moetool.kernels import two_bits

        packed, scale = parts
        codes = two_bits.unpacked(packed, torch.float32)
        if params["group"]:
            grouped = codes.view(len(codes), -1, params["group"])
            codes = (grouped * scale.float()[..., None]).view(codes.shape)
        else:
            codes = codes * scale.float()
        return codes.T if params["transposed"] else codes

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        from moetool.kernels import ternary, two_bits

        made = ternary.absmean(matrix.T if params["transposed"] else matrix, params["group"])
        return [two_bits.packed(made.codes), made.scale]
