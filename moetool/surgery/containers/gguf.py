"""GGUF: what llama.cpp reads. One file holds the config, the tokenizer and the tensors, each tensor
in one of ggml's kinds (kernels/ggml.py); the next begins at a multiple of 32 bytes.

A matrix in blocks is a target of dtype U8 [..., rows, bytes a row]; `said["types"]` names its kind.
`said["fields"]` are config and tokenizer, as surgery/gguf/ makes them.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from moetool.errors import MoetoolError
from moetool.reading import opened
from moetool.surgery.containers.container import Container, Shard, Whole
from moetool.surgery.containers.wire import HeaderField, Reader, packed, text
from moetool.surgery.spec import Shape, Stored, Target, size_of

ALIGNMENT = 32
DIGEST = "moetool.plan"
MAGIC, VERSION = b"GGUF", 3
_FLOATS = {"F32": 0, "F16": 1, "BF16": 30}
_CHUNK = 1 << 22  # bytes that are read of a header at first


class Kind(NamedTuple):
    """A kind of block: its number in a file, weights and bytes of a block."""

    number: int
    size: int
    held: int


KINDS = {
    "q4_0": Kind(2, 32, 18),
    "q4_1": Kind(3, 32, 20),
    "q5_0": Kind(6, 32, 22),
    "q5_1": Kind(7, 32, 24),
    "q8_0": Kind(8, 32, 34),
    "tq1_0": Kind(34, 256, 54),
    "tq2_0": Kind(35, 256, 66),
    "mxfp4": Kind(39, 32, 17),
}
# What the header says of the whole file: the kind of most weights (llama.cpp, llama_ftype).
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "BF16": 32,
    "tq1_0": 36,
    "tq2_0": 37,
    "mxfp4": 38,
}


class GgufFile(Container):
    """Names and order are llama.cpp's own (surgery/gguf/)."""

    name: ClassVar[str] = "gguf"

    def __init__(self) -> None:
        self._packed: tuple[str, bytes] = ("", b"")  # the fields of the last plan

    def lay(self, number: int, count: int, tensors: Sequence[Target], tasks: list[int]) -> Shard:
        part = f"-{number + 1:05d}-of-{count:05d}" if count > 1 else ""
        offsets, position = {}, 0
        for tensor in tensors:
            offsets[tensor.name] = (position, position + tensor.size)
            position += tensor.size + -tensor.size % ALIGNMENT
        last = max((stop for _, stop in offsets.values()), default=0)
        return Shard(f"model{part}.gguf", offsets, tuple(sorted(tasks)), position - last)

    def header(self, shard: Shard, whole: Whole) -> bytes:
        count, body = self._fields(shard, whole)
        made = [MAGIC, struct.pack("<IQQ", VERSION, len(shard.offsets), count), body]
        for name, (start, _) in shard.offsets.items():
            target, kind = whole.targets[name], whole.said["types"].get(name)
            shape = logical(target.shape, kind)
            number = KINDS[kind].number if kind else _FLOATS[target.dtype]
            made.append(text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1]))
            made.append(struct.pack("<IQ", number, start))
        size = sum(map(len, made))
        return b"".join(made) + bytes(-size % ALIGNMENT)

    def _fields(self, shard: Shard, whole: Whole) -> tuple[int, bytes]:
        """(number of fields, their bytes): everything in the first file, and in each which one of
        how many it is.
        """
        first = shard is whole.shards[0] or shard.name == whole.shards[0].name
        said = [HeaderField(*f) for f in whole.said["fields"]] if first else []
        seal = [HeaderField(DIGEST, "str", whole.digest)]
        if len(whole.shards) > 1:
            names = [s.name for s in whole.shards]
            seal += [
                HeaderField("split.no", "u16", names.index(shard.name)),
                HeaderField("split.count", "u16", len(names)),
                HeaderField("split.tensors.count", "i32", len(whole.targets)),
            ]
        if first and self._packed[0] != whole.digest:
            self._packed = (whole.digest, packed(said))
        body = self._packed[1] if first else b""
        return len(said) + len(seal), body + packed(seal)


def logical(shape: Shape, kind: str | None) -> Shape:
    """The shape of a matrix whose rows are so many bytes of blocks."""
    if kind is None:
        return shape
    return (*shape[:-1], shape[-1] // KINDS[kind].held * KINDS[kind].size)


class Head(NamedTuple):
    """What a file says of itself: its fields, its tensors in file order as they lie, the kinds of
    those in blocks, sha256 of the header, file size.
    """

    fields: Mapping[str, HeaderField]
    tensors: list[Stored]
    types: dict[str, str]
    seal: str
    size: int

    def value(self, key: str) -> object:
        """A field's value, or None."""
        return self.fields[key].value if key in self.fields else None


def read_head(path: Path) -> Head:
    """The header of a GGUF file, every claim of it checked; MoetoolError that names the file."""
    with opened(path, "weight file") as handle:
        size, amount = os.fstat(handle.fileno()).st_size, _CHUNK
        while True:
            handle.seek(0)
            data = handle.read(amount)
            try:
                return _head(path, data, size)
            except Reader.Short:
                if amount >= size:
                    raise _wrong(path, "it ends inside its header") from None
                amount *= 4
            except (ValueError, struct.error) as problem:
                raise _wrong(path, str(problem)[:200]) from None


def _head(path: Path, data: bytes, size: int) -> Head:
    reader = Reader(data)
    if data[:4] != MAGIC:
        raise ValueError("it does not begin with GGUF")
    reader.at = 4
    version, tensors, fields = reader.take("I"), reader.take("Q"), reader.take("Q")
    if version not in (2, 3):
        raise ValueError(f"version {version} is none that moetool reads (2, 3)")
    if max(tensors, fields) > size:
        raise ValueError("it promises more entries than it has bytes")
    table = {f.key: f for f in reader.fields(fields)}
    alignment = table["general.alignment"].value if "general.alignment" in table else ALIGNMENT
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError("its alignment is no number")
    entries = [_entry(reader) for _ in range(tensors)]
    base = reader.at + -reader.at % alignment
    stored = [_stored(path.name, e, base) for e in entries]
    _check(stored, size)
    types = {e.name: e.kind for e in entries if e.kind in KINDS}
    seal = hashlib.sha256(data[: reader.at]).hexdigest()
    return Head(table, stored, types, seal, size)


class _Tensor(NamedTuple):
    name: str
    shape: Shape
    kind: str  # of blocks, or a dtype
    start: int


_NUMBERS = {k.number: n for n, k in KINDS.items()} | {n: d for d, n in _FLOATS.items()}


def _entry(reader: Reader) -> _Tensor:
    name, rank = reader.string(), reader.take("I")
    if not 1 <= rank <= 4:
        raise ValueError(f"{name} has {rank} dimensions")
    shape = tuple(reader.take("Q") for _ in range(rank))[::-1]
    number, start = reader.take("I"), reader.take("Q")
    if number not in _NUMBERS:
        known = ", ".join([*_FLOATS, *KINDS])
        raise ValueError(f"{name} is of ggml's kind {number}, and moetool reads {known}")
    return _Tensor(name, shape, _NUMBERS[number], start)


def _stored(file: str, entry: _Tensor, base: int) -> Stored:
    dtype, shape = entry.kind, entry.shape
    if entry.kind in KINDS:
        kind = KINDS[entry.kind]
        if shape[-1] % kind.size:
            raise ValueError(f"a row of {entry.name} is no whole number of blocks")
        dtype, shape = "U8", (*shape[:-1], shape[-1] // kind.size * kind.held)
    start = base + entry.start
    return Stored(entry.name, dtype, shape, file, start, start + size_of(dtype, shape))


def _check(stored: Sequence[Stored], size: int) -> None:
    """Names once, ranges inside the file and apart."""
    if len({t.name for t in stored}) != len(stored):
        raise ValueError("a name stands twice")
    position = 0
    for tensor in sorted(stored, key=lambda t: t.start):
        if tensor.start < position or tensor.stop > size:
            raise ValueError(f"{tensor.name} lies over another tensor, or behind the end")
        position = tensor.stop


def _wrong(path: Path, why: str) -> MoetoolError:
    return MoetoolError(
        f"this is no GGUF file that moetool reads: {why}",
        file=path,
        hint="download it again, or convert the original checkpoint anew",
    )


def file_type(kinds: Mapping[str, str], tensors: Mapping[str, tuple[str, int]]) -> int:
    """The number of the kind that holds most weights. `kinds`: of those that have one; `tensors`:
    dtype and weights of all.
    """
    held: dict[str, int] = {}
    for name, (dtype, count) in tensors.items():
        kind = kinds.get(name, dtype)
        held[kind] = held.get(kind, 0) + count
    return FILE_TYPES[max(held, key=lambda k: held[k])]
