"""A family's matrix that lies in a file under another name, or in a tensor that several matrices
share: some rows of it, then at each step as many again. For reading; no value is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, ClassVar

from moetool.surgery.forms.form import Config, Form, Params, Recognised, Written
from moetool.surgery.spec import Piece, Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor


class InRows(Form):
    """params: {first, rows, step} of the tensor's rows; {}: all of it."""

    name: ClassVar[str] = "in_rows"
    alone: ClassVar[bool] = False
    moves: ClassVar[bool] = True

    def fits(self, target: Target, params: Params) -> bool:
        """Never: what is moved lies as its family has it."""
        return False

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        return (target,)

    def weights(self, matrix: Stored) -> dict[str, int]:
        """Every matrix has rows of its own."""
        return {matrix.name: matrix.elements}

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        """None: surgery/hub.py does it, which knows whose names these are."""
        return None

    def pieces(
        self, parts: Sequence[Stored | Target], shape: Shape, piece: Piece, params: Params
    ) -> tuple[Piece, ...]:
        """The runs of the tensor that a piece is made of, in its order."""
        (part,), width = parts, prod(shape[1:])
        found = _runs(piece, width * params.get("rows", shape[0]), width * params.get("step", 0))
        first = width * params.get("first", 0)
        return tuple(
            Piece(part.name, (count,), first + start, piece.source) for start, count in found
        )

    def config(self, config: Config, told: Config, written: Written) -> Config:
        return config

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        import torch

        return torch.cat([part.reshape(-1) for part in parts]).float()

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        raise NotImplementedError


def _runs(piece: Piece, long: int, step: int) -> Iterator[tuple[int, int]]:
    """(where, how many) of a piece's elements where each `long` of them are `step` apart."""
    at, stop = piece.offset, piece.offset + piece.count
    while at < stop:
        number, into = divmod(at, long)
        count = min(long - into, stop - at)
        yield number * step + into, count
        at += count
