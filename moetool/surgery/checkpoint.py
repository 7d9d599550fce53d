"""Read a safetensors checkpoint without loading it: names, dtypes, shapes and byte ranges, all
checked.

A Checkpoint is a value (no open handle), so it can be pickled to a worker. Its readers see every
matrix under the name and with the shape that its family knows, in whatever form it is stored
(surgery/forms/). Everything a hostile or broken file can say is checked here, once: header length,
JSON, duplicate names, dtypes, shapes, overlapping or missing ranges, truncation, indexes that lead
out of the folder, indexes and shards that disagree. Format: safetensors README.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moetool import strict_json
from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.reading import opened
from moetool.surgery import bounds, companions, forms, header, weights
from moetool.surgery.containers import gguf
from moetool.surgery.known import known
from moetool.surgery.spec import DTYPE_BITS, Piece, Stored, whole

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MAX_HEADER = 100_000_000  # the limit of the safetensors library itself


class Extent(NamedTuple):
    """Bytes of a file: `size` of them from `start` on."""

    path: str
    start: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `files` maps each weight file to (bytes, sha256 of its header).

    `tensors` and `config` are what a reader works with: matrices by the names of their family,
    whatever they are made of, and a config without what it told loaders of their forms (`told`,
    by form). `lying` are the tensors as they lie in the files, where that is not the same.
    """

    folder: str
    config: JsonObject
    tensors: dict[str, Stored]
    files: dict[str, tuple[int, str]]
    lying: dict[str, Stored] = field(default_factory=dict, repr=False)
    told: dict[str, JsonObject] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read headers and config of a folder, or of one `.safetensors` file with a config.json
        beside it.

        Raises MoetoolError naming the file (and tensor) for anything that is not a whole, honest
        checkpoint.
        """
        path = Path(path)
        if path.is_file():
            if path.suffix not in weights.SUFFIXES:
                weights.refuse_other(path)
            folder, shards, promised = path.parent, [path.name], None
        elif path.is_dir():
            folder = path
            shards, promised = weights.weight_files(path)
        else:
            raise MoetoolError(
                f"{path} does not exist",
                hint="give a folder, a .safetensors file or a Hub id like org/name",
            )
        companions.check_inside(folder / "config.json", "model config")
        companions.travelling(folder)  # links out of the folder, pipes: said before any work
        config = read_json(folder / "config.json", what="model config")
        bounds.check(config, folder / "config.json")
        read = _Files.read(folder, shards)
        if promised is not None:
            weights.compare_index(folder, promised, read.tensors)
        return cls._seen(str(folder), config, read)

    @classmethod
    def staged(cls, folder: str, shards: list[str], config: JsonObject) -> Checkpoint:
        """Finished shards of an output that has no config.json yet."""
        return cls._seen(folder, config, _Files.read(Path(folder), shards))

    @classmethod
    def _seen(cls, folder: str, config: JsonObject, read: _Files) -> Checkpoint:
        """Ask which matrices are known among the tensors."""
        try:
            lying = cls(folder, config, read.tensors, read.files)
            found = known(read.tensors, config, read.types, lying.content)
        except MoetoolError as problem:
            problem.where.setdefault("file", folder)
            raise
        if not found.told:
            return cls(folder, config, read.tensors, read.files)
        return cls(folder, found.config, found.tensors, read.files, read.tensors, found.told)

    @property
    def stored(self) -> dict[str, Stored]:
        """Every tensor as it lies in a file, parts of matrices included."""
        return self.lying or self.tensors

    def part(self, name: str) -> Stored:
        """The tensor of this name as it lies in a file; MoetoolError when it is missing."""
        return _present(self.stored, name, self.folder)

    def numbers(self, piece: Piece) -> np.ndarray:
        """A piece of a floating tensor as a float64 array [*shape], without torch where it lies
        in the file as it is.
        """
        from moetool.kernels import codec

        stored = self.tensor(piece.name)
        if stored.parts is not None:
            made: np.ndarray = self.matrix(piece).double().numpy()
            return made
        return codec.as_float64(self.read(piece), stored.dtype).reshape(piece.shape)

    def matrix(self, what: str | Piece, device: str = "cpu") -> Tensor:
        """A tensor, or a piece of one, as a torch tensor: decoded where it is stored in parts
        (then in float32), else in the dtype of its bytes.
        """
        from moetool.kernels import codec

        piece = whole(self.tensor(what)) if isinstance(what, str) else what
        parts, how = forms.split(self.tensor(piece.name), piece)
        read = [
            codec.decode(self.read(part), self.part(part.name).dtype, part.shape, device)
            for part in parts
        ]
        return forms.decoded(read, [how])[0]

    def tensor(self, name: str) -> Stored:
        """The tensor of this name as readers see it; MoetoolError when it is missing."""
        return _present(self.tensors, name, self.folder)

    def fingerprint(self) -> list[list[Any]]:
        """[file, bytes, header sha256] of every weight file: what a plan's digest knows of its
        source.
        """
        return [[name, *self.files[name]] for name in sorted(self.files)]

    def travelling(self) -> list[str]:
        """Files that go with the weights byte for byte: tokenizer, chat template, generation and
        processor configs.
        """
        return companions.travelling(self.folder)

    def range_of(self, piece: Piece) -> Extent:
        """(file, first byte, byte count) of a piece of a tensor as it lies in a file."""
        stored = self.part(piece.name)
        bits = DTYPE_BITS[stored.dtype]
        start, count = piece.offset * bits // 8, piece.count * bits // 8
        if stored.start + start + count > stored.stop:
            raise MoetoolError(
                "a plan reads past the end of a tensor",
                tensor=piece.name,
                expected=f"at most {stored.stop - stored.start} bytes",
                found=start + count,
                hint="report this as a bug of moetool",
            )
        return Extent(os.path.join(self.folder, stored.file), stored.start + start, count)

    def read(self, piece: Piece) -> bytearray:
        """The bytes of a piece as they lie in a file, by pread (no mapping stays behind)."""
        path, start, count = self.range_of(piece)
        return read_range(path, start, count)

    def content(self, stored: Stored) -> bytes:
        """The bytes of a small tensor."""
        return bytes(self.read(whole(stored)))


@dataclass(frozen=True)
class _Files:
    """What the headers of some weight files say; `types`: see `Header`."""

    tensors: dict[str, Stored]
    files: dict[str, tuple[int, str]]
    types: dict[str, str] | None = None

    @classmethod
    def read(cls, folder: Path, names: list[str]) -> _Files:
        """MoetoolError where a tensor stands in two files."""
        tensors: dict[str, Stored] = {}
        files: dict[str, tuple[int, str]] = {}
        types: dict[str, str] | None = None
        for name in names:
            header = read_header(folder / name)
            files[name] = (header.size, header.seal)
            types = types if header.types is None else (types or {}) | header.types
            for tensor in header.tensors:
                if tensor.name in tensors:
                    raise MoetoolError(
                        "the same tensor stands in two files",
                        tensor=tensor.name,
                        file=folder / name,
                        found=f"also in {tensors[tensor.name].file}",
                        hint="delete the stale shard or its index entry",
                    )
                tensors[tensor.name] = tensor
        return cls(tensors, files, types)


def _present(tensors: dict[str, Stored], name: str, folder: str) -> Stored:
    if name not in tensors:
        raise MoetoolError(
            "a tensor is missing",
            file=folder,
            tensor=name,
            expected="present",
            found="absent",
            hint="the checkpoint is incomplete: download or save it again",
        )
    return tensors[name]


def read_range(path: str, start: int, count: int) -> bytearray:
    """Exactly `count` bytes from `start`; MoetoolError when the file has become shorter."""
    buffer = bytearray(count)
    view = memoryview(buffer)
    handle = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < count:
            got = os.preadv(handle, [view[done : done + (1 << 30)]], start + done)
            if got == 0:
                raise MoetoolError(
                    "the file became shorter while it was read",
                    file=path,
                    expected=f"{start + count} bytes",
                    found=f"{start + done} bytes",
                    hint="do not change a source while moetool works on it",
                )
            done += got
    finally:
        os.close(handle)
    return buffer


class Header(NamedTuple):
    """What a weight file says of itself: tensors in file order, sha256 of the header, file size; of
    a GGUF file the kinds of its blocks by tensor, and its fields.
    """

    tensors: list[Stored]
    seal: str
    size: int
    types: dict[str, str] | None = None


def read_header(path: Path) -> Header:
    """The header of a file; every claim of it is checked."""
    try:
        if path.suffix == ".gguf":
            head = gguf.read_head(path)
            return Header(head.tensors, head.seal, head.size, head.types)
        with opened(path, "weight file") as handle:
            size = os.fstat(handle.fileno()).st_size
            raw = handle.read(8)
            if len(raw) < 8:
                raise MoetoolError(
                    "the file is too short for a safetensors header",
                    file=path,
                    expected="at least 8 bytes",
                    found=f"{size} bytes",
                    hint="download or save it again",
                )
            (length,) = struct.unpack("<Q", raw)
            if length > min(MAX_HEADER, size - 8):
                raise MoetoolError(
                    "the header length is not possible",
                    file=path,
                    expected=f"at most {min(MAX_HEADER, size - 8)}",
                    found=length,
                    hint="this is no safetensors file, or it is truncated: download it again",
                )
            body = handle.read(length)
    except FileNotFoundError:
        raise MoetoolError(
            "a weight file is missing",
            file=path,
            hint="download the missing shard, or correct the index",
        ) from None
    except OSError as problem:
        raise MoetoolError(
            f"cannot read the file: {problem.strerror}",
            file=path,
            hint="check the path and its permissions",
        ) from None
    seal = hashlib.sha256(raw + body).hexdigest()
    return Header(_parse_header(path, body, 8 + length, size), seal, size)


def _parse_header(path: Path, body: bytes, base: int, size: int) -> list[Stored]:
    stored = [_entry(path, name, e, base) for name, e in header.table(body, path).items()]
    stored.sort(key=lambda t: (t.start, t.stop))
    position = base
    for tensor in stored:
        if tensor.start != position:
            word = (
                "overlaps the tensor before it"
                if tensor.start < position
                else "leaves a hole before it"
            )
            raise MoetoolError(
                f"a tensor's range {word}",
                file=path,
                tensor=tensor.name,
                expected=f"start at byte {position - base}",
                found=tensor.start - base,
                hint="the header lies: save the file again",
            )
        position = tensor.stop
    if position != size:
        word = "is truncated" if position > size else "has bytes after its last tensor"
        raise MoetoolError(
            f"the file {word}",
            file=path,
            tensor=stored[-1].name if stored else None,
            expected=f"{position} bytes",
            found=f"{size} bytes",
            hint="download or save it again",
        )
    return stored


def _entry(path: Path, name: str, entry: Any, base: int) -> Stored:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        bits = DTYPE_BITS.get(dtype)
        honest = type(dtype) is str and len(entry) == 3
        for n in (start, stop, *shape):
            honest = honest and type(n) is int and 0 <= n < header.LARGEST
    except (TypeError, KeyError, ValueError):
        honest = False
    if not honest:
        raise MoetoolError(
            "a header entry is malformed",
            file=path,
            tensor=name,
            expected="dtype, shape and data_offsets",
            found=json.dumps(entry)[:80],
            hint="save the file again",
        )
    if bits is None:
        raise MoetoolError(
            "unknown dtype in the header",
            file=path,
            tensor=name,
            expected=", ".join(DTYPE_BITS),
            found=dtype,
            hint="update moetool, or re-save the checkpoint in another dtype",
        )
    size = header.byte_count(shape, bits)
    if stop - start != size:
        raise MoetoolError(
            "a tensor's byte range does not fit its shape",
            file=path,
            tensor=name,
            expected=f"{'whole' if size is None else size} bytes for {dtype} {list(shape)}",
            found=f"{stop - start} bytes",
            hint="the header lies: save the file again",
        )
    return Stored(name, dtype, shape, path.name, base + start, base + stop)


def read_json(path: Path, *, what: str) -> JsonObject:
    """A JSON object from a file; MoetoolError otherwise."""
    return strict_json.load(path, what)
