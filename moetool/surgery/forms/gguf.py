"""Matrices as llama.cpp holds them: U8 [..., rows, bytes], a row is blocks (kernels/ggml.py), or
plain numbers. Only a GGUF file can say which (containers/gguf.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.errors import MoetoolError
from moetool.kernels.grid import Grid
from moetool.surgery.containers.gguf import KINDS
from moetool.surgery.forms.form import Config, Form, Format, Params, Recognised, Written
from moetool.surgery.spec import FLOATS, Piece, Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.kernels.rounding import Rounded

PLAIN = {"f16": "F16", "bf16": "BF16"}
# What levels are in units of the scale, and what the largest of a group is divided by.
_LEVELS = {"q4_0": (-8, 7), "q5_0": (-16, 15), "q8_0": (-127, 127), "tq1_0": (-1, 1)}
_LEVELS["tq2_0"] = _LEVELS["tq1_0"]
_BITS = {"q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "q8_0": 8.5, "mxfp4": 4.25}
_BITS |= {"tq1_0": 1.6875, "tq2_0": 2.0625}


def _formats() -> dict[str, Format]:
    """gguf:KIND; embeddings go to q8_0 beside what has few bits."""
    beside = {"embed": "gguf:q8_0", "lm_head": "gguf:q8_0"}
    made = {
        f"gguf:{kind}": Format(f"llama.cpp's {kind}, {bits} bits", {"kind": kind}, beside=beside)
        for kind, bits in _BITS.items()
    }
    for kind in PLAIN:
        both = dict.fromkeys(beside, f"gguf:{kind}")
        made[f"gguf:{kind}"] = Format(f"{kind} in a GGUF file", {"kind": kind}, beside=both)
    return made


class Gguf(Form):
    """params: {kind}."""

    name: ClassVar[str] = "gguf"
    container: ClassVar[str] = "gguf"
    formats: ClassVar[Mapping[str, Format]] = _formats()

    def fits(self, target: Target, params: Params) -> bool:
        return target.dtype in FLOATS and not self.misfit(target, params)

    def misfit(self, target: Target, params: Params) -> str:
        size = KINDS[params["kind"]].size if params["kind"] in KINDS else 1
        if len(target.shape) < 2:
            return "it is no matrix"
        if target.shape[-1] % size:
            return f"its rows of {target.shape[-1]} are no whole number of blocks of {size}"
        return ""

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        kind = params["kind"]
        if kind in PLAIN:
            return (Target(target.name, PLAIN[kind], target.shape),)
        size, held = KINDS[kind].size, KINDS[kind].held
        width = target.shape[-1] // size * held
        return (Target(target.name, "U8", (*target.shape[:-1], width)),)

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        """None: nothing but the file itself says what these bytes are (surgery/gguf/reading.py)."""
        return None

    def pieces(
        self, parts: Sequence[Stored | Target], shape: Shape, piece: Piece, params: Params
    ) -> tuple[Piece, ...] | None:
        """Whole rows."""
        (part,), columns = parts, shape[-1]
        if piece.shape[-1:] != shape[-1:] or piece.offset % columns:
            return None
        width = part.shape[-1]
        offset = piece.offset // columns * width
        return (Piece(part.name, (*piece.shape[:-1], width), offset, piece.source),)

    def config(self, config: Config, told: Config, written: Written) -> Config:
        """Nothing: the GGUF file says it itself."""
        return config

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import ggml

        (data,), kind = parts, params["kind"]
        return data.float() if kind in PLAIN else ggml.decode(data, kind)

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        """As llama.cpp rounds to nearest."""
        from moetool.kernels import ggml

        if params["kind"] not in PLAIN:
            return (ggml.encode(matrix, params["kind"]),)
        if params["kind"] == "f16" and not (matrix.is_meta or matrix.half().isfinite().all()):
            raise MoetoolError(
                "half precision does not hold a weight of this matrix",
                expected="weights up to 65504",
                found=float(matrix.abs().max()),
                hint="ask for gguf:bf16",
            )
        return (matrix,)

    def grid(self, shape: Shape, params: Params) -> Grid | None:
        """None for plain numbers, and for blocks that have a minimum."""
        kind = params["kind"]
        if kind == "mxfp4":
            from moetool.kernels.grid import e2m1

            return e2m1(32, "E8M0")
        if kind not in _LEVELS:
            return None
        low, high = _LEVELS[kind]
        levels = tuple(map(float, range(low, high + 1)))
        return Grid(levels, KINDS[kind].size, float(-low), "F16", signed=True)

    def pack(self, rounded: Rounded, params: Params) -> Sequence[Tensor]:
        from moetool.kernels import ggml

        return (ggml.pack(rounded.codes, rounded.scales, params["kind"]),)
