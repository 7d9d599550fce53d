"""fp8 as DeepSeek-V3 ships it: `X.weight` in E4M3 and `X.weight_scale_inv`, a scale for each block
of 128 x 128 (`quantization_config: {"quant_method": "fp8", "weight_block_size": [128, 128]}`).

The block comes from the config alone: shape divided by rows of scales is wrong where blocks at
the edge are smaller (576 rows have 5 rows of scales, not 5 blocks of 115.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.forms.form import (
    Config,
    Form,
    Format,
    Params,
    Recognised,
    Written,
    float_of,
    made_of,
    slabs,
)
from moetool.surgery.spec import FLOATS, InParts, Piece, Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = "_scale_inv"
_BLOCK = [128, 128]  # the default of transformers' FineGrainedFP8Config
# Scales of activations, fixed beforehand: their matrices are not read yet.
_STATIC = (".activation_scale", ".input_scale")
_EMPTY = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
_SKIPPED = ("modules_to_not_convert", "ignored_layers")
_POWERS = ("U8", "F8_E8M0")  # dtypes of scales that hold nothing but powers of two


class Fp8Block(Form):
    """E4M3 with a scale a block; params: {block: [rows, columns], scale: dtype, power: whether
    scales are powers of two}.
    """

    name: ClassVar[str] = "fp8_block"
    quant_method: ClassVar[str] = "fp8"
    formats: ClassVar[Mapping[str, Format]] = {
        "fp8-block": Format(
            "E4M3 with a scale for 128 x 128, as DeepSeek-V3 ships it",
            {"block": _BLOCK, "scale": "F32", "power": False},
        )
    }

    def fits(self, target: Target, params: Params) -> bool:
        single = len(target.shape) == 2 and target.name.endswith(".weight")
        stacked = len(target.shape) == 3 and not target.name.endswith(".weight")
        return target.dtype in FLOATS and (single or stacked)

    def misfit(self, target: Target, params: Params) -> str:
        if not self.fits(target, params) or len(target.shape) != 2:
            return "fp8 blocks hold single matrices called `.weight`"
        for size, height, word in zip(
            target.shape, params["block"], ("rows", "columns"), strict=True
        ):
            if size % height:
                return (
                    f"{height} does not divide its {size} {word}, and loaders read smaller blocks "
                    "at the edge wrongly"
                )
        return ""

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        return (
            Target(target.name, "F8_E4M3", target.shape),
            Target(target.name + _SCALES, params["scale"], _grid(target.shape, params["block"])),
        )

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        said = config.get("quantization_config")
        if not isinstance(said, dict) or said.get("quant_method") != "fp8":
            return None
        block = said.get("weight_block_size", _BLOCK)
        if not _is_block(block):
            return None
        found: dict[str, Stored] = {}
        for name, scale in tensors.items():
            if name.endswith(_STATIC):
                return None
            if name.endswith(_SCALES):
                full = name.removesuffix(_SCALES)
                power = said.get("scale_fmt") == "ue8m0" or scale.dtype in _POWERS
                params = {"block": list(block), "scale": scale.dtype, "power": power}
                found[full] = _matrix(full, tensors.get(full), scale, params, float_of(config))
        bare = [n for n, t in tensors.items() if t.dtype == "F8_E4M3" and n not in found]
        if found and bare:
            raise MoetoolError(
                "an fp8 matrix has no scales",
                tensor=bare[0],
                expected=bare[0] + _SCALES,
                found="nothing",
                hint="the checkpoint is incomplete: download it again",
            )
        if not found:
            return None
        rest = {k: v for k, v in config.items() if k != "quantization_config"}
        return Recognised(found, rest, {"quantization_config": said})

    def pieces(
        self, parts: Sequence[Stored | Target], shape: Shape, piece: Piece, params: Params
    ) -> tuple[Piece, ...] | None:
        """Whole matrices, entries of a stack, and rows that begin where a block does."""
        known = super().pieces(parts, shape, piece, params)
        if known is not None or len(shape) != 2:
            return known or slabs(parts, shape, piece)
        height, (weight, scale) = params["block"][0], parts
        if piece.shape[1:] != shape[1:] or piece.offset % (height * shape[1]):
            return None
        first, down = piece.offset // shape[1] // height, -(-piece.shape[0] // height)
        across = scale.shape[1]
        return (
            Piece(weight.name, piece.shape, piece.offset, piece.source),
            Piece(scale.name, (down, across), first * across, piece.source),
        )

    def config(self, config: Config, told: Config, written: Written) -> Config:
        said: JsonObject = dict(told.get("quantization_config") or _EMPTY)
        named = _modules(written.new if told else written.full)
        if named or not told:
            key = next((k for k in _SKIPPED if said.get(k) is not None), _SKIPPED[0])
            known = said.get(key) or ["lm_head"]
            said[key] = [*known, *(n for n in named if n not in known)]
        if not told:
            block = next(iter(written.matrices.values()))[1]["block"]
            said["weight_block_size"] = list(block)
            if "lm_head.weight" in written.matrices:
                said[_SKIPPED[0]].remove("lm_head")
        return config | {"quantization_config": said}

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import blockscale

        weight, scale = parts
        return blockscale.decode_fp8(weight, scale, params["block"])

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        from moetool.kernels import blockscale, codec

        return blockscale.encode_fp8(
            matrix, params["block"], codec.torch_dtype(params["scale"]), power=params["power"]
        )


def _modules(full: Sequence[Target]) -> list[str]:
    """Modules of full matrices; all experts of a layer are one."""
    names = (
        t.name.removesuffix(".weight")
        for t in full
        if len(t.shape) > 2 or (t.name.endswith(".weight") and len(t.shape) == 2)
    )
    return list(
        dict.fromkeys(n.partition(".experts.")[0] + ".experts" * (".experts." in n) for n in names)
    )


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, list)
        and len(block) == 2
        and all(isinstance(n, int) and n > 0 for n in block)
    )


def _grid(shape: Shape, block: Sequence[int]) -> Shape:
    """Shape of the scales, blocks at the edges included."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _matrix(full: str, weight: Stored | None, scale: Stored, params: Params, dtype: str) -> Stored:
    if weight is None or weight.dtype != "F8_E4M3" or len(weight.shape) < 2:
        raise MoetoolError(
            "scales without their fp8 matrix",
            tensor=scale.name,
            expected=f"{full} in F8_E4M3",
            found="nothing" if weight is None else f"{weight.dtype} {list(weight.shape)}",
            hint="the checkpoint is incomplete: download it again",
        )
    expected = _grid(weight.shape, params["block"])
    if scale.shape != expected or scale.dtype not in (*FLOATS, *_POWERS):
        raise MoetoolError(
            "the scales of an fp8 matrix do not fit its blocks",
            tensor=scale.name,
            expected=f"{list(expected)} for {list(weight.shape)} in blocks of {params['block']}",
            found=f"{scale.dtype} {list(scale.shape)}",
            hint="weight_block_size in config.json is another model's: restore the original",
        )
    return made_of(
        "fp8_block", full, dtype, weight.shape, InParts("fp8_block", (weight, scale), params)
    )
