"""What weight files say of themselves; every claim is checked against the file."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from moetool.errors import MoetoolError
from moetool.reading import opened
from moetool.surgery import header
from moetool.surgery.containers import gguf
from moetool.surgery.spec import DTYPE_BITS, Stored

MAX_HEADER = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class WeightFiles:
    """What the headers of some weight files say; `types`: see `Header`."""

    tensors: dict[str, Stored]
    files: dict[str, tuple[int, str]]
    types: dict[str, str] | None = None

    @classmethod
    def read(cls, folder: Path, names: list[str]) -> WeightFiles:
        """MoetoolError where a tensor stands in two files. One of a file in a folder of it has that
        in its name: `1/NAME`.
        """
        tensors: dict[str, Stored] = {}
        files: dict[str, tuple[int, str]] = {}
        types: dict[str, str] | None = None
        for name in names:
            read = read_header(folder / name)
            files[name] = (read.size, read.seal)
            types = types if read.types is None else (types or {}) | read.types
            inside = name.rpartition("/")[0]
            for tensor in read.tensors:
                if inside:
                    tensor = replace(tensor, name=f"{inside}/{tensor.name}", file=name)
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
