"""Weights of 8 bits as they are, in a dtype of their own, with scales of rows, blocks or the matrix
(compressed-tensors' naive-quantized and its aliases): what such forms share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.surgery.forms.compressed_tensors import (
    WEIGHT,
    CompressedTensors,
    scaled_by,
    weights,
)
from moetool.surgery.forms.form import Params, Read
from moetool.surgery.spec import Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

# Dynamic scales of activations, one a token, as llm-compressor's FP8_DYNAMIC and W8A8 say it.
TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}


class Scaled(CompressedTensors):
    """params: {strategy: channel or tensor, scale: dtype of the scales}."""

    suffixes: ClassVar[tuple[str, ...]] = (".weight_scale", ".weight")
    dtype: ClassVar[str] = ""  # of the stored weights
    type: ClassVar[str] = ""  # the library's word for it

    def kind(self, params: Params) -> str:
        return self.kinds[0] if params.get("activations") else "naive-quantized"

    def settled(self, target: Target, params: Params) -> Params:
        return {"scale": scaled_by(target.dtype), **params}

    def weights_of(self, params: Params) -> JsonObject:
        return weights(8, self.type, params["strategy"])

    def params_of(self, weights: JsonObject) -> Params | None:
        if weights.get("type", "int") != self.type or weights["num_bits"] != 8:
            return None
        strategy = weights.get("strategy") or "tensor"
        if strategy not in ("channel", "tensor") or not weights.get("symmetric", True):
            return None
        return {"strategy": strategy}

    def settle(self, params: Params, parts: Sequence[Stored], read: Read | None) -> Params:
        found = {**params, "scale": parts[0].dtype}
        if params.get("strategy") == "tensor" and parts[0].shape != (1,):
            found["of"] = list(parts[0].shape)
        return found

    def shape_of(self, parts: Sequence[Stored], params: Params) -> Shape | None:
        return parts[1].shape if len(parts[1].shape) == 2 else None

    def own(self, target: Target, params: Params) -> tuple[Target, ...]:
        stem = target.name.removesuffix(WEIGHT)
        scales = (target.shape[0], 1) if params["strategy"] == "channel" else (1,)
        return (
            Target(
                f"{stem}.weight_scale", params.get("scale", "BF16"), self._scales(scales, params)
            ),
            Target(target.name, self.dtype, target.shape),
        )

    @staticmethod
    def _scales(shape: Shape, params: Params) -> Shape:
        return tuple(params["of"]) if "of" in params else shape

    def weights(self, matrix: Stored) -> dict[str, int]:
        assert matrix.parts is not None
        return {matrix.parts.tensors[1].name: matrix.elements}

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import blockscale

        scale, weight = parts[:2]
        made = weight.float() if self.type == "int" else blockscale.floats(weight)
        return made.mul_(scale.float().reshape(-1, 1))
