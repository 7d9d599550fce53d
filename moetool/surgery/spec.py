"""The nouns of surgery: a stored tensor, a piece of one, and the task that makes pieces from
pieces.

No torch, no file handles: every value here can be pickled to a worker or written as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from moetool.data import JsonObject
from moetool.errors import MoetoolError

# Bits per element, by safetensors dtype name.
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
FLOATS = ("F64", "F32", "BF16", "F16")

Shape = tuple[int, ...]


def size_of(dtype: str, shape: Shape) -> int:
    """Bytes of a tensor; raises MoetoolError for an unknown dtype."""
    if dtype not in DTYPE_BITS:
        raise MoetoolError(
            f"unknown dtype {dtype!r}",
            expected=", ".join(DTYPE_BITS),
            hint="update moetool or re-save the checkpoint",
        )
    return prod(shape) * DTYPE_BITS[dtype] // 8


@dataclass(frozen=True, slots=True)
class InParts:
    """What a matrix that does not lie whole in its file is made of: the stored tensors, in the
    order in which the form (a file in surgery/forms/) decodes them, and the form's parameters.
    """

    form: str
    tensors: tuple[Stored, ...]
    params: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file: bytes [start, stop) of `file` (a path relative to its
    checkpoint).

    A matrix in a form other than `full` has `parts`: dtype and shape are then those of the
    decoded matrix, and the place is that of its first part. `first`: where it is a run of rows of
    the tensor of its name (`run_of`), the elements before it.
    """

    name: str
    dtype: str
    shape: Shape
    file: str
    start: int
    stop: int
    parts: InParts | None = None
    first: int = 0

    def checked(self) -> Stored:
        """Itself; ValueError where its parts, read from a file that people edit, do not hold
        together.
        """
        numbers = (*self.shape, self.start, self.stop)
        words = (self.name, self.dtype, self.file)
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{self.name}: {numbers}")
        if not all(isinstance(w, str) for w in words):
            raise ValueError(str(words))
        if self.stop - self.start != size_of(self.dtype, self.shape):
            raise ValueError(f"{self.name}: {self.dtype} {self.shape} is not as long as said")
        return self

    @property
    def lying(self) -> tuple[Stored, ...]:
        """What lies in the files for it: its parts, or itself where it is full."""
        return self.parts.tensors if self.parts else (self,)

    @property
    def size(self) -> int:
        """Bytes in the files, all parts together."""
        return sum(p.size for p in self.parts.tensors) if self.parts else self.stop - self.start

    @property
    def elements(self) -> int:
        """Number of values of the (decoded) tensor."""
        return prod(self.shape)

    @property
    def held(self) -> int:
        """Bytes in memory as `Checkpoint.matrix` gives it: decoded matrices are float32."""
        return 4 * self.elements if self.parts else self.size


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous run of elements of one tensor, seen with its own shape.

    As an input, `source` says which checkpoint; as an output it is unused. `offset` counts
    elements. The whole tensor is offset 0 with the tensor's shape; rows a:b of [n, m] are offset
    a*m with shape [b-a, m].
    """

    name: str
    shape: Shape
    offset: int = 0
    source: int = 0

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def as_json(self) -> list[Any]:
        return [self.source, self.name, self.offset, list(self.shape)]

    @classmethod
    def from_json(cls, data: list[Any]) -> Piece:
        return cls(name=data[1], shape=tuple(data[3]), offset=data[2], source=data[0])


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: Shape

    @property
    def size(self) -> int:
        """Bytes."""
        return size_of(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Task:
    """Make `outputs` from `inputs` by the operation `op` (a name in surgery/ops.py)."""

    op: str
    inputs: tuple[Piece, ...]
    outputs: tuple[Piece, ...]
    params: JsonObject = field(default_factory=dict)

    def as_json(self) -> list[Any]:
        return [
            self.op,
            [p.as_json() for p in self.inputs],
            [p.as_json() for p in self.outputs],
            self.params,
        ]

    @classmethod
    def from_json(cls, data: list[Any]) -> Task:
        return cls(
            data[0],
            tuple(map(Piece.from_json, data[1])),
            tuple(map(Piece.from_json, data[2])),
            data[3],
        )


def rows(tensor: Stored | Target | Piece, start: int, stop: int, source: int = 0) -> Piece:
    """Rows start:stop (first axis) of a tensor, as a piece."""
    width = prod(tensor.shape[1:])
    base = tensor.offset if isinstance(tensor, Piece) else _first(tensor)
    return Piece(tensor.name, (stop - start, *tensor.shape[1:]), base + start * width, source)


def whole(tensor: Stored | Target, source: int = 0) -> Piece:
    """All of a tensor."""
    return Piece(tensor.name, tensor.shape, _first(tensor), source)


def run_of(tensor: Stored, number: int, count: int) -> Stored:
    """One of `count` equal runs of a tensor's rows, seen as a tensor."""
    size, shape = tensor.size // count, (tensor.shape[0] // count, *tensor.shape[1:])
    start = tensor.start + number * size
    first = number * prod(shape)
    return replace(tensor, shape=shape, start=start, stop=start + size, first=first)


def _first(tensor: Stored | Target) -> int:
    return tensor.first if isinstance(tensor, Stored) else 0
