"""Ternary linears as transformers' bitnet quantizer reads them (BitNet b1.58, arXiv 2402.17764):
`X.weight` U8 [out / 4, in], four codes of two bits a byte along the output, and `X.weight_scale`
[1], by which the product is multiplied (`linear_class: autobitlinear`).

`BitLinear`, the quantizer's other class, divides by the scale: both are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.errors import MoetoolError, Unfit
from moetool.surgery.forms.form import (
    Config,
    Form,
    Format,
    Params,
    Recognised,
    Written,
    float_of,
    made_of,
)
from moetool.surgery.spec import FLOATS, InParts, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

KEY, METHOD = "quantization_config", "bitnet"
VALUES = 4  # codes a byte
_WEIGHT, _SCALE = ".weight", ".weight_scale"


class Bitnet(Form):
    """params: {divide: whether a loader divides by the scale, any: whether a matrix may be rounded
    that is not ternary already, scale: dtype of the scale, empty for the matrix's own}.
    """

    name: ClassVar[str] = "bitnet"
    quant_method: ClassVar[str] = METHOD
    formats: ClassVar[Mapping[str, Format]] = {
        "ternary": Format(
            "-1, 0, 1 times one scale a matrix, of dense linears that were trained so",
            {"divide": False, "any": False, "scale": ""},
        )
    }

    def forced(self, params: Params) -> Params:
        return {**params, "any": True}

    def fits(self, target: Target, params: Params) -> bool:
        return not self.misfit(target, params)

    def misfit(self, target: Target, params: Params) -> str:
        single = len(target.shape) == 2 and target.name.endswith(_WEIGHT)
        if not (single and target.dtype in FLOATS):
            return "bitnet holds single matrices called `.weight`"
        if target.shape[0] % VALUES:
            return f"its {target.shape[0]} rows are no multiple of {VALUES}"
        return ""

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        rows, columns = target.shape
        stem = target.name.removesuffix(_WEIGHT)
        return (
            Target(target.name, "U8", (rows // VALUES, columns)),
            Target(stem + _SCALE, params["scale"] or target.dtype, (1,)),
        )

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        said = config.get(KEY)
        if not isinstance(said, dict) or said.get("quant_method") != METHOD:
            return None
        if said.get("quantization_mode", "offline") == "online":
            return None  # full weights, rounded at every forward pass
        divide = said.get("linear_class", "bitlinear") == "bitlinear"
        found: dict[str, Stored] = {}
        for name, packed in tensors.items():
            if packed.dtype == "U8" and name.endswith(_WEIGHT) and len(packed.shape) == 2:
                scale = _scale(tensors, name)
                params = {"divide": divide, "any": True, "scale": scale.dtype}
                shape = (VALUES * packed.shape[0], packed.shape[1])
                parts = InParts(self.name, (packed, scale), params)
                found[name] = made_of(self.name, name, float_of(config), shape, parts)
        if not found:
            return None
        rest = {k: v for k, v in config.items() if k != KEY}
        return Recognised(found, rest, {KEY: said})

    def config(self, config: Config, told: Config, written: Written) -> Config:
        divide = any(params["divide"] for _, params in written.matrices.values())
        said: JsonObject = dict(told.get(KEY) or {})
        said |= {
            "quant_method": METHOD,
            "linear_class": "bitlinear" if divide else "autobitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": _full(written),
        }
        return config | {KEY: said}

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import ternary

        packed, scale = parts
        scale = scale.float()
        return ternary.unpacked(packed) * (1.0 / scale if params["divide"] else scale)

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        from moetool.kernels import ternary

        made = ternary.rounded(matrix)
        if not (made.exact or params["any"]):
            raise Unfit(
                "a matrix is not ternary: rounding it so ruins a model that was not trained for it",
                expected="values of -s, 0 and s alone",
                found=f"a relative error of {made.error:.2f}",
                hint="use int2 with --calibrate, or --force",
            )
        scale = 1.0 / made.scale if params["divide"] else made.scale
        return [ternary.packed(made.codes), scale.reshape(1)]


def _full(written: Written) -> list[str]:
    """Modules of full matrices: every other linear is replaced by the quantizer."""
    names = [
        t.name.removesuffix(_WEIGHT)
        for t in written.full
        if len(t.shape) == 2 and t.name.endswith(_WEIGHT)
    ]
    return sorted({*names, "lm_head"})


def _scale(tensors: Mapping[str, Stored], name: str) -> Stored:
    scale = tensors.get(name.removesuffix(_WEIGHT) + _SCALE)
    if scale is None or scale.elements != 1:
        raise MoetoolError(
            "a ternary matrix has no scale",
            tensor=name,
            expected=name.removesuffix(_WEIGHT) + _SCALE + " of one number",
            found="nothing" if scale is None else list(scale.shape),
            hint="the checkpoint is incomplete: download it again",
        )
    return scale
