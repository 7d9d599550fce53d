"""Which matrices of a checkpoint stand in each stacked parameter of a model's experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from moetool.kernels import codec
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.plain_experts import PlainExperts
from moetool.surgery.spec import InParts, Piece, Stored, whole

if TYPE_CHECKING:
    from torch import Tensor

_ROLES = {"gate_up": ("gate", "up"), "down": ("down",)}


@dataclass(frozen=True)
class Stack:
    """A parameter [experts, rows, columns] of a layer: for each expert the matrices that lie in
    its entry, one above the other.
    """

    name: str
    entries: tuple[tuple[Stored, ...], ...]

    @property
    def shape(self) -> torch.Size:
        first = self.entries[0]
        rows = sum(m.shape[0] for m in first)
        return torch.Size((len(self.entries), rows, first[0].shape[1]))

    @property
    def matrices(self) -> Iterator[Stored]:
        """All matrices, in the order in which they lie in the parameter."""
        return chain.from_iterable(self.entries)

    @property
    def like(self) -> InParts:
        """The form, params and parts of its first matrix; all others are as this one."""
        found = self.entries[0][0].parts
        assert found is not None
        return found


def stacks(source: Checkpoint) -> list[Stack]:
    """Those of all layers, where experts are stored one by one and the family stacks them gate
    above up. MoetoolError for other families.
    """
    plain = PlainExperts.of(source)
    found = []
    for layer in plain.layers:
        pieces = [plain.pieces(layer, e) for e in range(plain.count)]
        for role, names in _ROLES.items():
            entries = tuple(_entry(source, piece, names) for piece in pieces)
            found.append(Stack(plain.named(plain.layout.fused()[role], layer), entries))
    return found


def _entry(
    source: Checkpoint, pieces: Mapping[str, Piece], names: Sequence[str]
) -> tuple[Stored, ...]:
    """The matrices of one expert that lie in a parameter."""
    return tuple(source.tensor(pieces[name].name) for name in names)


def parts(source: Checkpoint, matrix: Stored, device: object = "cpu") -> list[Tensor]:
    """The parts of a matrix as they lie in the file, in the order in which it is decoded."""
    return [
        codec.decode(source.read(whole(p)), p.dtype, p.shape, str(device)) for p in matrix.lying
    ]
