"""Share blocks instead of copying bytes, where the file system can (btrfs, XFS with reflink): what
is cloned takes no time and no disk. Linux' FICLONERANGE, man 2 ioctl_ficlonerange.
"""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

BLOCK = 4096  # ranges are cloned in blocks; larger blocks of a file system refuse, and are copied
_FICLONERANGE = 0x4020940D
_RANGE = "=qQQQ"  # source, its offset, bytes, where to


class Move(Protocol):
    """A byte move of `count` bytes from `start` of a file to `to` of the target."""

    @property
    def path(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def to(self) -> int: ...
    @property
    def count(self) -> int: ...


def clone(source: int, target: int, start: int, to: int, count: int) -> bool:
    """Let `count` bytes of a file from `start` on also stand at `to` of the target, without a copy;
    False where these two files cannot share blocks.
    """
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack(_RANGE, source, start, count, to))
    except OSError:  # another file system, or one that cannot: whoever asks copies, and sees
        return False  # what is really wrong
    return True


def blocks_of(start: int, to: int, count: int) -> tuple[int, int]:
    """(first, count) of the whole blocks in a move, counted from its start; count 0 where source
    and target lie differently in their blocks.
    """
    if (start - to) % BLOCK:
        return 0, 0
    first = -start % BLOCK
    return first, max(0, (count - first) // BLOCK * BLOCK)


def works_in(folder: Path) -> bool:
    """Whether files of this folder can share blocks; tried on two of its own."""
    try:
        with tempfile.TemporaryFile(dir=folder) as one, tempfile.TemporaryFile(dir=folder) as two:
            one.write(bytes(BLOCK))
            one.flush()
            os.ftruncate(two.fileno(), BLOCK)
            return clone(one.fileno(), two.fileno(), 0, 0, BLOCK)
    except OSError:
        return False


class Donors:
    """Where in a target bytes of a source already stand, to be found again."""

    def __init__(self, moves: Iterable[Move]) -> None:
        self._runs: dict[str, list[tuple[int, int, int]]] = {}
        for move in moves:
            self._runs.setdefault(move.path, []).append((move.start, move.count, move.to))
        for runs in self._runs.values():
            runs.sort()

    def find(self, move: Move) -> int | None:
        """The place in the target of the bytes that a move brings; None where they are not."""
        runs = self._runs.get(move.path, [])
        at = bisect_right(runs, (move.start, float("inf"), 0)) - 1
        if at < 0:
            return None
        start, count, to = runs[at]
        inside = move.start + move.count <= start + count
        return to + move.start - start if inside else None
