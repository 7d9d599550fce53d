"""What a file holds, said in a few bytes: so that weights that changed under the same header are
seen, and the same bytes are the same wherever they lie and whenever they were downloaded.

A header says names, shapes and places, but a fine-tune has those of its base. A seal is a hash of
what is inside: of everything in a file of up to 64 MiB, else of the header and blocks of every
tensor (its first, its last, and one drawn from its name), up to 3 x 4,096 blocks of 4 KiB a file.
Training or merging moves every block, so the sample tells two models apart; a change of a few
values between the blocks it cannot see, and `touched_since` says when to look at every byte.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from moetool.surgery.checkpoint import Checkpoint, read_range
from moetool.surgery.spec import Stored

WHOLE = 64 << 20  # bytes of a file that is read whole
BLOCK = 4096
MOST = 4096  # tensors of a file that are looked at


def content(checkpoint: Checkpoint) -> list[list[str]]:
    """[file, seal] of every weight file: what `moetool.json` and statistics keep of a source."""
    return list(chain.from_iterable(map(_content, checkpoint.real)))


def _content(checkpoint: Checkpoint) -> list[list[str]]:
    by_file: dict[str, list[Stored]] = {}
    for tensor in checkpoint.stored.values():
        by_file.setdefault(tensor.file, []).append(tensor)
    found = []
    for name in sorted(checkpoint.files):
        path, header = os.path.join(checkpoint.folder, name), checkpoint.files[name][1]
        found.append([name, _sealed(path, _stamp(path), header, tuple(by_file.get(name, ())))])
    return found


def of_file(path: str | Path) -> str:
    """The seal of a file that is read whole, whatever its size."""
    return _read(str(path), _stamp(path))


def touched_since(checkpoint: Checkpoint, record: Path) -> bool:
    """Whether a weight file was written, moved or linked after `record` was: then its seal alone
    does not say that every byte is still the same.
    """
    then = record.stat().st_mtime_ns
    return any(max(s.st_mtime_ns, s.st_ctime_ns) > then for s in map(os.stat, _paths(checkpoint)))


def _paths(checkpoint: Checkpoint) -> list[str]:
    """The weight files that hold its bytes."""
    each = ([os.path.join(real.folder, n) for n in sorted(real.files)] for real in checkpoint.real)
    return list(chain.from_iterable(each))


class _Stamp(NamedTuple):
    """What changes with a file's bytes."""

    size: int
    written: int
    changed: int


def _stamp(path: str | Path) -> _Stamp:
    made = os.stat(path)
    return _Stamp(made.st_size, made.st_mtime_ns, made.st_ctime_ns)


@lru_cache(maxsize=4096)
def _sealed(path: str, stamp: _Stamp, header: str, stored: Sequence[Stored]) -> str:
    size = stamp.size
    if size <= WHOLE:
        return _whole(path, size)
    seal = hashlib.blake2b(header.encode(), digest_size=16)
    for start, count in _blocks(stored):
        seal.update(read_range(path, start, count))
    return "sample:" + seal.hexdigest()


@lru_cache(maxsize=4096)
def _read(path: str, stamp: tuple[int, int, int]) -> str:
    return _whole(path, stamp[0])


def _whole(path: str, size: int) -> str:
    seal = hashlib.blake2b(digest_size=16)
    for start in range(0, size, 1 << 20):
        seal.update(read_range(path, start, min(1 << 20, size - start)))
    return seal.hexdigest()


def _blocks(stored: Iterable[Stored]) -> Iterator[tuple[int, int]]:
    """(first byte, count) of the blocks that stand for a large file."""
    tensors = sorted(stored, key=lambda t: t.start)
    step = max(1, len(tensors) // MOST)
    for tensor in tensors[::step]:
        size = tensor.stop - tensor.start
        if size <= 3 * BLOCK:
            yield tensor.start, size
            continue
        drawn = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:8], "little")
        middle = BLOCK + drawn % (size - 3 * BLOCK + 1)
        for offset in (0, middle, size - BLOCK):
            yield tensor.start + offset, BLOCK
