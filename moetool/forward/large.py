"""Text that is too large to hold: where its documents lie, and each read when its turn comes.

Memory stays the same however long a file is: of lines only the offsets are kept (of at most
`MOST`; of more every second, every fourth, ...), of .parquet the row groups, and a .txt is read in
pieces. The order of lines is the one that they have when all are held; rows of a row group stay
together.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from moetool.errors import MoetoolError
from moetool.forward import documents
from moetool.forward.documents import Document, Table
from moetool.kernels import draw
from moetool.reading import check_regular, opened

HELD = 8 << 20  # bytes of text that are held; more is read as it is wanted
MOST = 1 << 20  # lines of a file whose places are kept
PIECE = 256 << 10  # of a .txt


class Places(Protocol):
    """A file whose documents lie at numbered places."""

    def __len__(self) -> int: ...

    def at(self, place: int) -> Iterator[Document]:
        """The documents of a place: none where a line is empty, several of a row group."""
        ...


@dataclass(frozen=True)
class Large:
    """The documents of one or several files."""

    files: tuple[Places, ...]

    def order(self, seed: int | None) -> Iterator[Document]:
        """All documents: as they lie, or in an order drawn from the seed."""
        ends = list(accumulate(map(len, self.files)))
        total = ends[-1] if ends else 0
        places: Iterable[int] = range(total)
        if seed is not None:
            places = map(int, draw.permutation(total, seed, "documents"))
        for place in places:
            number = bisect_right(ends, place)
            yield from self.files[number].at(place - (ends[number - 1] if number else 0))


def of(paths: Iterable[Path], field: str, name: str = "") -> Large:
    """Where the documents of these files lie; `name` stands in messages for a file of ours."""
    return Large(tuple(_places(path, field, name or str(path)) for path in paths))


def _places(path: Path, field: str, name: str) -> Places:
    try:
        check_regular(path, "text")
        if path.suffix == ".parquet":
            return Groups(Table.open(path, field))
        if path.suffix in documents.LINES:
            return Lines.scan(path, field, name)
        return Pieces(path, name)
    except OSError as problem:
        raise documents.unreadable(path, problem) from None


@dataclass(frozen=True)
class Lines:
    """A .jsonl file: where its lines begin, and their numbers."""

    path: Path
    field: str
    name: str
    starts: array[int]
    numbers: array[int]

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def scan(cls, path: Path, field: str, name: str) -> Lines:
        """Find the lines that are not empty."""
        starts, numbers, step, place, found = array("Q"), array("Q"), 1, 0, 0
        with opened(path, "text") as handle:
            for number, line in enumerate(documents.lines(path, handle), 1):
                if line.strip():
                    if found % step == 0:
                        starts.append(place)
                        numbers.append(number)
                    found += 1
                    if len(starts) > MOST:
                        starts, numbers, step = starts[::2], numbers[::2], 2 * step
                place += len(line)
        return cls(path, field, name, starts, numbers)

    def at(self, place: int) -> Iterator[Document]:
        with opened(self.path, "text") as handle:
            handle.seek(self.starts[place])
            line = handle.readline(documents.MAX_LINE + 1)
        yield from documents.of_line(line, self.name, self.numbers[place], self.field)


@dataclass(frozen=True)
class Groups:
    """A .parquet file."""

    table: Table

    def __len__(self) -> int:
        return self.table.groups

    def at(self, place: int) -> Iterator[Document]:
        yield from self.table.rows(place)


@dataclass(frozen=True)
class Pieces:
    """A .txt file: one document, in pieces that end with a line where they can."""

    path: Path
    name: str

    def __len__(self) -> int:
        return 1

    def at(self, place: int) -> Iterator[Document]:
        last: Document | None = None
        line = 1
        for data in self._pieces():
            for piece in documents.plain(self.name, data, line):
                if last is not None:
                    yield replace(last, more=True)
                last = piece
            line += data.count(b"\n")
        if last is None:
            raise MoetoolError(
                "there is no text here",
                file=self.name,
                expected="at least one document",
                found="nothing",
                hint="give a file with text in it",
            )
        yield last

    def _pieces(self) -> Iterator[bytes]:
        rest = b""
        with opened(self.path, "text") as handle:
            while more := handle.read(PIECE):
                data = rest + more
                end = _cut(data)
                rest = data[end:]
                if end:
                    yield data[:end]
        if rest:
            yield rest


def _cut(data: bytes) -> int:
    """Where a piece ends: after its last line, else its last space, else its last character."""
    for mark in (b"\n", b" "):
        end = data.rfind(mark) + 1
        if end:
            return end
    end = len(data)
    while end > max(0, len(data) - 4) and data[end - 1] & 0xC0 == 0x80:
        end -= 1  # bytes inside a character
    return end - 1 if end and data[end - 1] >= 0xC0 else len(data)
