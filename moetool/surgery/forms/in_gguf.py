"""A family's matrix that lies in a GGUF file: in one tensor of it, in the slab of a stack, or in
several that were made of it, turned as llama.cpp has them (kernels/turn.py). For reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, ClassVar

from moetool.surgery.containers.gguf import KINDS
from moetool.surgery.forms.form import Config, Form, Params, Recognised, Written
from moetool.surgery.spec import Piece, Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor


class InGguf(Form):
    """params: {kinds: ggml's kind of each part, "" for plain numbers; turn; expert: the slab}."""

    name: ClassVar[str] = "in_gguf"
    container: ClassVar[str] = "gguf"
    alone: ClassVar[bool] = False

    def fits(self, target: Target, params: Params) -> bool:
        """Never: what is computed or moved is written in full (`quantize` writes GGUF)."""
        return False

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        return (target,)

    def bits(self, shape: Shape, params: Params) -> float:
        """Of its largest part; plain numbers count as 16."""
        kinds = [KINDS[k] for k in params["kinds"] if k]
        return max((8 * k.held / k.size for k in kinds), default=16.0)

    def weights(self, matrix: Stored) -> dict[str, int]:
        """Every matrix has its own place."""
        return {matrix.name: matrix.elements}

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        """None: surgery/gguf/reading.py does it, which knows the file's own table."""
        return None

    def pieces(
        self, parts: Sequence[Stored | Target], shape: Shape, piece: Piece, params: Params
    ) -> tuple[Piece, ...] | None:
        """Rows of a matrix that lies as the family has it; else all of it."""
        expert = params.get("expert")
        if params["turn"] == ["same"] and len(shape) > 1:
            (part,), columns = parts, shape[-1]
            if piece.shape[-1:] == shape[-1:] and piece.offset % columns == 0:
                width = part.shape[-1]
                first = piece.offset // columns + (expert or 0) * prod(shape[:-1])
                return (Piece(part.name, (*piece.shape[:-1], width), first * width, piece.source),)
        if piece.offset or piece.count != prod(shape):
            return None
        return tuple(_slab(p, expert, piece.source) for p in parts)

    def config(self, config: Config, told: Config, written: Written) -> Config:
        return config

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import ggml, turn

        plain = [
            ggml.decode(p, kind) if kind else p.float()
            for p, kind in zip(parts, params["kinds"], strict=True)
        ]
        return turn.back(plain, params["turn"])

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        raise NotImplementedError


def _slab(part: Stored | Target, expert: int | None, source: int) -> Piece:
    """A part, or of a stack the slab of one expert."""
    if expert is None:
        return Piece(part.name, part.shape, 0, source)
    inner = part.shape[1:]
    return Piece(part.name, inner, expert * prod(inner), source)
