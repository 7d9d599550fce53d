"""mxfp4 as gpt-oss ships it: stacked experts `X` [experts, in, out] as `X_blocks` U8 [experts, out,
in / 32, 16] and `X_scales` U8 [experts, out, in / 32] (`quant_method: mxfp4`).

The file holds the transposed of what the model uses (x @ W): transformers turns it too
(integrations/mxfp4.py, convert_moe_packed_tensors).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

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

GROUP = 32
_BLOCKS, _SCALES = "_blocks", "_scales"


class Mxfp4(Form):
    """E2M1 with a power of two for 32 neighbours; no params."""

    name: ClassVar[str] = "mxfp4"
    quant_method: ClassVar[str] = "mxfp4"
    formats: ClassVar[Mapping[str, Format]] = {
        "mxfp4": Format("E2M1 with a power of two for 32 neighbours, gpt-oss's own way")
    }

    def fits(self, target: Target, params: Params) -> bool:
        shape = target.shape
        return target.dtype in FLOATS and len(shape) == 3 and shape[1] % GROUP == 0

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        experts, columns, rows = target.shape
        groups = (experts, rows, columns // GROUP)
        return (
            Target(target.name + _BLOCKS, "U8", (*groups, GROUP // 2)),
            Target(target.name + _SCALES, "U8", groups),
        )

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        said = config.get("quantization_config")
        if not isinstance(said, dict) or said.get("quant_method") != "mxfp4":
            return None
        found = {
            name.removesuffix(_BLOCKS): _matrix(
                blocks, tensors.get(name.removesuffix(_BLOCKS) + _SCALES), float_of(config)
            )
            for name, blocks in tensors.items()
            if name.endswith(_BLOCKS)
        }
        if not found:
            return None
        rest = {k: v for k, v in config.items() if k != "quantization_config"}
        return Recognised(found, rest, {"quantization_config": said})

    def pieces(
        self, parts: Sequence[Stored | Target], shape: Shape, piece: Piece, params: Params
    ) -> tuple[Piece, ...] | None:
        """Whole stacks, and experts of them."""
        return super().pieces(parts, shape, piece, params) or slabs(parts, shape, piece)

    def config(self, config: Config, told: Config, written: Written) -> Config:
        if told and not written.new:
            return config | told
        made = {re.sub(r"\.\d+\.", ".*.", n) for n in map(_module, written.full) if n}
        said = {"quant_method": "mxfp4", "modules_to_not_convert": sorted(made | {"lm_head"})}
        return config | {"quantization_config": said}

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import blockscale

        return blockscale.decode_mxfp4(*parts)

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        from moetool.kernels import blockscale

        return blockscale.encode_mxfp4(matrix)


def _module(target: Target) -> str:
    """The module of a full matrix (all of an attention is one); empty for what is none."""
    name = target.name.removesuffix(".weight")
    if len(target.shape) != 2 or name == target.name:
        return ""
    at = name.find(".self_attn.")
    return name if at < 0 else name[: at + len(".self_attn")]


def _matrix(blocks: Stored, scales: Stored | None, dtype: str) -> Stored:
    full, shape = blocks.name.removesuffix(_BLOCKS), blocks.shape
    good = len(shape) == 4 and shape[3] == GROUP // 2 and blocks.dtype == "U8"
    if not good or scales is None or scales.shape != shape[:3] or scales.dtype != "U8":
        raise MoetoolError(
            "an mxfp4 matrix is not whole",
            tensor=full,
            expected="_blocks U8 [experts, rows, groups, 16] and _scales U8 [experts, rows, groups]",
            found=f"{blocks.dtype} {list(shape)} and "
            + (f"{scales.dtype} {list(scales.shape)}" if scales else "nothing"),
            hint="the checkpoint is incomplete: download it again",
        )
    decoded = (shape[0], GROUP * shape[2], shape[1])
    return made_of("mxfp4", full, dtype, decoded, InParts("mxfp4", (blocks, scales)))
