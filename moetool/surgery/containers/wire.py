"""The values of a GGUF header, to bytes and back (little endian, version 3).

A field is (key, kind, value): kind is u8 ... f64, bool, str, or one of those in brackets for an
array. Source: ggml/docs/gguf.md; tests hold the bytes against the `gguf` package.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

KINDS = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "array", "u64", "i64", "f64")
_CODES = dict(zip(KINDS, "BbHhIif?  Qqd", strict=True))
_ARRAY = KINDS.index("array")


class HeaderField(NamedTuple):
    """One entry of the header's table."""

    key: str
    kind: str
    value: Any


def text(value: str) -> bytes:
    """A string with its length before it; half a surrogate pair becomes a question mark."""
    body = value.encode("utf-8", "replace")
    return struct.pack("<Q", len(body)) + body


def packed(fields: Iterable[HeaderField]) -> bytes:
    """The fields of a table, one after the other; arrays must not be empty."""
    return b"".join(_field(f) for f in fields)


def _field(made: HeaderField) -> bytes:
    inner = made.kind.strip("[]")
    if inner == made.kind:
        head, values = struct.pack("<I", KINDS.index(inner)), [made.value]
    else:
        head = struct.pack("<IIQ", _ARRAY, KINDS.index(inner), len(made.value))
        values = made.value
    if inner == "str":
        return text(made.key) + head + b"".join(map(text, values))
    return text(made.key) + head + struct.pack(f"<{len(values)}{_CODES[inner]}", *values)


class Reader:
    """Takes values from the beginning of a file. `Short` where the bytes end too early: then more
    of the file is needed.
    """

    class Short(Exception):
        """The bytes at hand end inside a value."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, code: str) -> Any:
        """One number."""
        return self._many(code, 1)[0]

    def _many(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}") * count
        self._need(size)
        found = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += size
        return found

    def _need(self, count: int) -> None:
        if self.at + count > len(self.data):
            raise Reader.Short

    def string(self) -> str:
        """A string; UnicodeDecodeError, a ValueError, where it is none."""
        size = self.take("Q")
        self._need(size)
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def fields(self, count: int) -> Iterator[HeaderField]:
        """So many entries; ValueError for a kind that there is not."""
        for _ in range(count):
            key = self.string()
            kind = self._kind()
            if kind != "array":
                yield HeaderField(key, kind, self._values(kind, 1)[0])
                continue
            inner = self._kind()
            if inner == "array":
                raise ValueError(f"{key} is an array of arrays")
            yield HeaderField(key, f"[{inner}]", self._values(inner, self.take("Q")))

    def _kind(self) -> str:
        number = self.take("I")
        if number >= len(KINDS):
            raise ValueError(f"there is no kind {number} of values")
        return KINDS[number]

    def _values(self, kind: str, count: int) -> list[Any]:
        if kind == "str":
            self._need(8 * count)
            return [self.string() for _ in range(count)]
        return list(self._many(_CODES[kind], count))
