"""Byte ranges of files -> their places in one file: blocks are shared where the file system can,
else moved in the kernel or through a small buffer.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from moetool.errors import MoetoolError
from moetool.surgery import clone, ops, scan
from moetool.surgery.scan import Suspect

_NO_RANGE_COPY = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EPERM,
}


class Standing(NamedTuple):
    """From where on bytes stand in a file."""

    file: str
    start: int


@dataclass(frozen=True)
class Copy:
    """A byte move, absolute positions. `first`: no other move of the job reads these bytes (so
    they are looked at once). `elsewhere`: where they stand beside their source, to be shared.
    """

    path: str
    start: int
    to: int
    count: int
    dtype: str
    first: bool = True
    elsewhere: Standing | None = None

    def part(self, at: int, count: int) -> Copy:
        """`count` bytes of it, from `at` on."""
        there = self.elsewhere and Standing(self.elsewhere.file, self.elsewhere.start + at)
        start, to = self.start + at, self.to + at
        return replace(self, start=start, to=to, count=count, elsewhere=there)


class Mover:
    """Moves byte ranges into one file, in the kernel (`copy_file_range`) or through a buffer,
    whichever proves faster.

    Where blocks can be shared or a server copies (XFS, btrfs, NFS) the kernel wins by far; on ext4
    its page-wise splice takes a third longer than a small buffer (6.18, measured), and two threads
    on one file get in each other's way. So the first large ranges are timed, one each way, and the
    faster way does the rest. The bytes are the same.

    With `donors` (what of the sources already stands in the target) blocks are shared first, with
    the target's own, with those of other shards (`others`, open) or with the source's, until the
    file system refuses.
    """

    _TIMED = 8 << 20

    def __init__(
        self,
        target: int,
        *,
        watch: bool = False,
        donors: clone.Donors | None = None,
        others: Mapping[str, int] | None = None,
    ) -> None:
        self._target, self._watch, self._donors = target, watch, donors
        self._others = {} if others is None else others
        self._refused: set[int] = set()  # files that share no blocks with the target
        self._rates: dict[bool, float] = (
            {} if hasattr(os, "copy_file_range") else {True: 0.0, False: 1.0}
        )
        self._local = threading.local()
        self.suspects: list[Suspect] = []

    def move(self, source: int, copy: Copy) -> None:
        """All bytes of a move. With `watch`, ranges with NaN or inf end up in `suspects`."""
        if self._donors is not None and self._cloned(source, copy, self._donors):
            self._look(copy)
            return
        in_kernel = self._choose()
        begun = time.perf_counter()
        if in_kernel:
            try:
                self._in_kernel(source, copy)
            except OSError as problem:
                if problem.errno not in _NO_RANGE_COPY:
                    raise
                self._rates = {True: 0.0, False: 1.0}
                in_kernel = False
        if not in_kernel:
            self._through_buffer(source, copy)
        if copy.count >= self._TIMED:
            self._rates.setdefault(in_kernel, copy.count / (time.perf_counter() - begun))
        if in_kernel:
            self._look(copy)

    def _look(self, copy: Copy) -> None:
        """Look at what did not pass through a buffer."""
        if self._watch and copy.first:
            self.suspects += scan.bad_ranges(
                copy.path, copy.start, copy.start + copy.count, copy.dtype
            )

    def _cloned(self, source: int, copy: Copy, donors: clone.Donors) -> bool:
        """Whether the blocks of a move could be shared; what is no whole block is copied then."""
        for file, start in self._places(source, copy, donors):
            if file in self._refused:
                continue
            first, count = clone.blocks_of(start, copy.to, copy.count)
            if not count:
                continue
            if clone.clone(file, self._target, start + first, copy.to + first, count):
                rest = first + count
                self._edge(source, copy, 0, first)
                self._edge(source, copy, rest, copy.count - rest)
                return True
            self._refused.add(file)
        return False

    def _places(self, source: int, copy: Copy, donors: clone.Donors) -> Iterator[tuple[int, int]]:
        """Open files in which the bytes of a move stand, and where."""
        place = None if copy.first else donors.find(copy)
        if place is not None:
            yield self._target, place
        if copy.elsewhere is not None:
            yield self._others[copy.elsewhere.file], copy.elsewhere.start
        yield source, copy.start

    def _edge(self, source: int, copy: Copy, at: int, count: int) -> None:
        """A part of a move that is less than a block."""
        if count:
            done = os.pread(source, count, copy.start + at)
            _some(len(done), copy, at)
            write_at(self._target, done, copy.to + at)

    def _choose(self) -> bool:
        if len(self._rates) < 2:
            return True not in self._rates
        return self._rates[True] > self._rates[False]

    def _in_kernel(self, source: int, copy: Copy) -> None:
        done = 0
        while done < copy.count:
            got = os.copy_file_range(
                source, self._target, copy.count - done, copy.start + done, copy.to + done
            )
            _some(got, copy, done)
            done += got

    def _through_buffer(self, source: int, copy: Copy) -> None:
        if not hasattr(self._local, "view"):
            self._local.view = memoryview(bytearray(ops.COPY_BUFFER))
        view, done, watch = self._local.view, 0, self._watch and copy.first
        while done < copy.count:
            want = min(len(view), copy.count - done)
            got = 0
            while got < want:  # whole blocks, so that values are not cut
                more = os.preadv(source, [view[got:want]], copy.start + done + got)
                _some(more, copy, done + got)
                got += more
            write_at(self._target, view[:got], copy.to + done)
            if watch and scan.bad_block(view[:got], copy.dtype):
                self.suspects.append(
                    (copy.path, copy.start + done, copy.start + done + got, copy.dtype)
                )
            done += got


def _some(got: int, copy: Copy, done: int) -> None:
    if got == 0:
        raise MoetoolError(
            "the file became shorter while it was read",
            file=copy.path,
            expected=f"{copy.start + copy.count} bytes",
            found=f"{copy.start + done} bytes",
            hint="do not change a source while moetool works on it",
        )


def write_at(handle: int, data: Any, position: int) -> None:
    """All of some bytes at a position of a file."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done : done + (1 << 30)], position + done)
