"""fp8 with a scale a block as compressed-tensors stores it (`float-quantized`, strategy block):
`weight` E4M3 and `weight_scale` [blocks down, blocks across]. DeepSeek's own is fp8_block.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.surgery.forms.compressed_tensors import WEIGHT, weights
from moetool.surgery.forms.form import Format, Params
from moetool.surgery.forms.scaled import TOKEN, Scaled
from moetool.surgery.spec import Target

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = [128, 128]


class Fp8CtBlock(Scaled):
    """params: {block: [rows, columns], scale: dtype of the scales}."""

    name: ClassVar[str] = "fp8_ct_block"
    kinds: ClassVar[tuple[str, ...]] = ("float-quantized", "naive-quantized")
    dtype: ClassVar[str] = "F8_E4M3"
    type: ClassVar[str] = "float"
    formats: ClassVar[Mapping[str, Format]] = {
        "fp8-block-ct": Format(
            "E4M3 with a scale for 128 x 128, in compressed-tensors' words",
            {
                "block": _BLOCK,
                "activations": {"type": "float", **TOKEN, "strategy": "group", "group_size": 128},
            },
        )
    }

    def weights_of(self, params: Params) -> JsonObject:
        return weights(8, "float", "block") | {"block_structure": list(params["block"])}

    def params_of(self, weights: JsonObject) -> Params | None:
        block = weights.get("block_structure")
        if weights.get("type") != "float" or weights.get("strategy") != "block" or not block:
            return None
        sides = block.split("x") if isinstance(block, str) else block  # "128x128" once
        rows, columns = (int(side) for side in sides)
        return {"block": [rows, columns]} if min(rows, columns) > 0 else None

    def misfit(self, target: Target, params: Params) -> str:
        """Its input is quantized in blocks as well, and none may be smaller: the first forward of
        compressed-tensors raises.
        """
        width = (params.get("activations") or {}).get("group_size") or 1
        if target.shape[-1] % width:
            return f"its input width {target.shape[-1]} is no multiple of {width}"
        return super().misfit(target, params)

    def own(self, target: Target, params: Params) -> tuple[Target, ...]:
        stem = target.name.removesuffix(WEIGHT)
        sides = zip(target.shape, params["block"], strict=True)
        blocks = tuple(-(-size // side) for size, side in sides)
        return (
            Target(f"{stem}.weight_scale", params.get("scale", "BF16"), blocks),
            Target(target.name, self.dtype, target.shape),
        )

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        from moetool.kernels import blockscale, codec

        self.refuse_static(params)
        dtype = codec.torch_dtype(params.get("scale", "BF16"))
        weight, scale = blockscale.encode_fp8(matrix, params["block"], dtype)
        return [scale, weight]

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import blockscale

        scale, weight = parts[:2]
        return blockscale.decode_fp8(weight, scale, params["block"])
