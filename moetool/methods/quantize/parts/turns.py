"""In which order the matrices of a layer are solved, and what that holds: numbers alone.

A turn is what one pass of the text is looked at for. All linears of a layer are one turn, where
--memory has room for their Hessians; else its experts come in several. What is solved in one go (a
chunk) does not depend on the room, so that the bytes do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from moetool.forward.linears import Linear
from moetool.kernels import gptq
from moetool.methods.quantize.choice import Choice
from moetool.surgery import forms
from moetool.surgery.forms import Spelled
from moetool.surgery.roles import Matrix

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 32 << 20  # bytes of the Hessians of experts that are solved in one go
SIDE_BY_SIDE = 8  # but at least so many experts: those with few tokens lean on the others


@dataclass(frozen=True, eq=False)
class Part:
    """A matrix of the output: some rows of a linear, with its format."""

    matrix: Matrix
    format: Spelled
    linear: Linear
    row: int

    @property
    def rows(self) -> int:
        return self.matrix.shape[0]

    @property
    def told(self) -> str:
        """Its format: what parts that are solved as one have in common."""
        return json.dumps([self.format.form, self.format.params], sort_keys=True)

    @property
    def weight(self) -> Tensor:
        """[out, in], float32, while its layer is in memory."""
        return self.linear.weight[self.row : self.row + self.rows]


@dataclass(frozen=True)
class Unit:
    """Parts on the same inputs and in the same format: they are solved as one matrix."""

    lead: str  # the linear whose inputs were kept
    parts: tuple[Part, ...]

    @property
    def like(self) -> tuple[object, ...]:
        """What units must have in common to be solved side by side."""
        first = self.parts[0]
        rows = tuple(p.rows for p in self.parts)
        return first.linear.role, rows, first.linear.shape[1], first.told


Chunk = tuple[Part, ...]
Turn = tuple[Chunk, ...]


def of(linears: Sequence[Linear], choice: Choice, room: int) -> list[Turn]:
    """The turns of a layer whose Hessians need at most `room` bytes at once, or one chunk."""
    made: list[list[Chunk]] = [[]]
    held = 0
    for chunk in _chunks(linears, choice):
        needed = sum(4 * width * width for width in _inputs(chunk))
        if made[-1] and held + needed > room:
            made.append([])
            held = 0
        made[-1].append(chunk)
        held += needed
    return [tuple(turn) for turn in made]


def solvable(choice: Choice) -> Iterator[Matrix]:
    """The single matrices of layers whose format has a grid."""
    for name, asked in choice.formats.items():
        matrix = choice.matrices[name]
        single = matrix.layer is not None and len(matrix.shape) == 2
        if single and forms.named(asked.form).grid(matrix.shape, asked.params) is not None:
            yield matrix


def _chunks(linears: Sequence[Linear], choice: Choice) -> Iterator[Chunk]:
    """What lies outside of the experts, then some experts after the other."""
    found = list(_parts(linears, choice))
    outside = tuple(p for p in found if p.linear.expert is None)
    if outside:
        yield outside
    experts = [p for p in found if p.linear.expert is not None]
    if not experts:
        return
    many = chunk_of(max(p.linear.shape[1] for p in experts))
    for _, some in groupby(experts, lambda p: (p.linear.expert or 0) // many):
        yield tuple(some)


def chunk_of(width: int) -> int:
    """How many experts with inputs this wide are solved in one go."""
    return max(SIDE_BY_SIDE, CHUNK // (4 * width * width))


def _parts(linears: Sequence[Linear], choice: Choice) -> Iterator[Part]:
    """Each linear's matrices in the output; those that lie turned round, or whose stack is one
    matrix there, have none.
    """
    if not linears:
        return
    lying: dict[str, list[Matrix]] = {}
    for matrix in solvable(choice):
        if matrix.layer == linears[0].layer:
            lying.setdefault(matrix.piece.name, []).append(matrix)
    for linear in linears:
        for matrix in lying.get(linear.piece.name, ()):
            row, rest = divmod(matrix.piece.offset - linear.piece.offset, linear.shape[1])
            alike = not linear.turned and matrix.shape[1] == linear.shape[1] and not rest
            if alike and 0 <= row <= linear.shape[0] - matrix.shape[0]:
                yield Part(matrix, choice.formats[matrix.name], linear, row)


def _inputs(chunk: Iterable[Part]) -> Iterator[int]:
    """The width of each input that is kept for a chunk, at most."""
    seen = set()
    for part in chunk:
        linear = part.linear
        shared = linear.role in ("gate", "up", "gate_up")
        key = (linear.expert, "in") if shared else linear.key
        if key not in seen:
            seen.add(key)
            yield linear.shape[1]


def units(chunk: Chunk, leads: dict[str, str]) -> list[list[Unit]]:
    """A chunk's units, those side by side that are alike. leads: linear -> the one whose inputs
    stand for its own.
    """
    by_input: dict[tuple[str, str], list[Part]] = {}
    for part in chunk:
        by_input.setdefault((leads[part.linear.key], part.told), []).append(part)
    alike: dict[tuple[object, ...], list[Unit]] = {}
    for (lead, _), parts in by_input.items():
        unit = Unit(lead, tuple(parts))
        alike.setdefault(unit.like, []).append(unit)
    return list(alike.values())


@dataclass(frozen=True)
class Held:
    """Bytes that solving holds beside a layer: Hessians of `all` its matrices, or at `least` of a
    chunk, and what it needs `beside` them.
    """

    all: int
    least: int
    beside: int

    @classmethod
    def of(cls, choice: Choice) -> Held:
        """The most over all layers; matrices are counted by their shapes, so that linears which
        share their inputs may count twice.
        """
        by_layer: dict[int, list[Matrix]] = {}
        for matrix in solvable(choice):
            by_layer.setdefault(matrix.layer or 0, []).append(matrix)
        made = [_held(matrices, choice) for matrices in by_layer.values()]
        most = [max(sizes, default=0) for sizes in zip(*made, strict=True)] or [0, 0, 0]
        return cls(*most)


def _held(matrices: Sequence[Matrix], choice: Choice) -> tuple[int, ...]:
    outside, experts = 0, 0
    for m in matrices:
        if m.expert is None:
            outside += 4 * m.shape[1] ** 2
        elif m.part != "up":
            experts += 4 * m.shape[1] ** 2
    width = max(m.shape[1] for m in matrices)
    most = max(m.shape[0] for m in matrices)
    numbers = {m.expert for m in matrices if m.expert is not None}
    some = min(len(numbers), chunk_of(width))
    chunk = experts // max(1, len(numbers)) * some
    stored = sum(_stored(m, choice) for m in matrices)
    rows = 2 * most if numbers else 3 * most  # of matrices that share their inputs
    beside = max(1, some) * 4 * (2 * width * width + 2 * rows * width)
    return outside + experts, max(outside, chunk), 2 * stored + beside + gptq.holds(rows, width)


def _stored(matrix: Matrix, choice: Choice) -> int:
    asked = choice.formats[matrix.name]
    form = forms.named(asked.form)
    return int(form.bits(matrix.shape, asked.params) * matrix.shape[0] * matrix.shape[1] / 8)
