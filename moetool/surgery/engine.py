"""Make a plan's shards, on threads here or on a Ray cluster: one worker function of plain values
serves both.

Bytes that are only moved go through `copy_file_range` or a small buffer (see Mover); computed
tensors come one task at a time. Nothing is left under a shard's final name until the shard is
whole.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from moetool import atomic
from moetool.errors import MoetoolError, Stopped
from moetool.surgery import clone, ops, scan
from moetool.surgery.checkpoint import Checkpoint, Extent, read_range
from moetool.surgery.plan import Plan, Shard, elements
from moetool.surgery.scan import Suspect
from moetool.surgery.spec import Piece, Task

Tell = Callable[[int], None]
_STEP = 64 << 20  # between two looks at the stop flag
_NO_RANGE_COPY = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EPERM,
}


@dataclass(frozen=True)
class Copy:
    """A byte move, absolute positions. `first`: no other move of the job reads these bytes (so
    they are looked at once).
    """

    path: str
    start: int
    to: int
    count: int
    dtype: str
    first: bool = True


@dataclass(frozen=True)
class Job:
    """All a worker needs to make one shard, as values."""

    path: str  # the shard's temporary name, on a file system that the worker sees
    header: bytes
    size: int  # of the whole file
    copies: tuple[Copy, ...]
    tasks: tuple[Task, ...]
    dtypes: dict[str, str]
    starts: dict[str, int]  # where each tensor begins in the file
    ranges: tuple[tuple[tuple[Extent, str], ...], ...]  # per task and input, with its dtype
    tables: dict[str, list[int]]
    device: str
    threads: int
    watch: bool = False  # look for NaN and inf in what is copied
    clone: bool = True  # share blocks where the file system can


@dataclass(frozen=True)
class How:
    """How shards are made. `threads` are dealt out by size, at least one a shard; `watch`: look for
    NaN and inf in what is copied; `clone`: share blocks where the file system can.
    """

    device: str = "cpu"
    threads: int = 1
    watch: bool = False
    clone: bool = True


def jobs_of(
    plan: Plan,
    sources: Sequence[Checkpoint],
    shards: Sequence[Shard],
    folder: str,
    how: How = How(),
) -> Iterator[Job]:
    """The work of the given shards."""
    everything = sum(s.size for s in shards) or 1
    for shard in shards:
        header = plan.header(shard)
        starts = {name: len(header) + start for name, (start, _) in shard.offsets.items()}
        dtypes = {name: plan.targets[name].dtype for name in shard.offsets}
        tasks = [plan.tasks[i] for i in shard.tasks]
        computed = tuple(t for t in tasks if ops.OPS[t.op].run is not None)
        used = sorted(set(chain.from_iterable(map(ops.tables_of, computed))))
        yield Job(
            os.path.join(folder, shard.name + atomic.SUFFIX),
            header,
            len(header) + shard.size,
            tuple(_copies(tasks, sources, starts, dtypes)),
            computed,
            dtypes,
            starts,
            tuple(_ranges(t, sources) for t in computed),
            {k: plan.tables[k] for k in used},
            how.device,
            max(1, round(how.threads * shard.size / everything)),
            how.watch,
            how.clone,
        )


def _ranges(task: Task, sources: Sequence[Checkpoint]) -> tuple[tuple[Extent, str], ...]:
    """Where a task's inputs lie, and their dtypes."""
    return tuple(
        (sources[p.source].range_of(p), sources[p.source].part(p.name).dtype) for p in task.inputs
    )


def _copies(
    tasks: Sequence[Task],
    sources: Sequence[Checkpoint],
    starts: dict[str, int],
    dtypes: dict[str, str],
) -> Iterator[Copy]:
    """Byte moves, neighbours of one dtype joined."""
    last: Copy | None = None
    seen: set[tuple[str, int]] = set()
    for task in tasks:
        if task.op != "copy":
            continue
        for source, out in zip(task.inputs, task.outputs, strict=True):
            path, start, count = sources[source.source].range_of(source)
            dtype = dtypes[out.name]
            offset, size = elements(out, dtype)
            if size != count:
                raise MoetoolError(
                    "a copy changes size",
                    tensor=out.name,
                    expected=f"{size} bytes",
                    found=f"{count} bytes",
                    hint="report this as a bug of moetool",
                )
            move = Copy(
                path, start, starts[out.name] + offset, count, dtype, (path, start) not in seen
            )
            seen.add((path, start))
            if last and (
                last.path,
                last.start + last.count,
                last.to + last.count,
                last.dtype,
                last.first,
            ) == (path, start, move.to, dtype, move.first):
                last = replace(last, count=last.count + count)
                continue
            if last:
                yield last
            last = move
    if last:
        yield last


def make_shard(
    job: Job, tell: Tell | None = None, stop: Callable[[], bool] = lambda: False
) -> list[Suspect]:
    """Write one shard under its temporary name; returns ranges with NaN or inf. Runs in a thread
    or in a Ray worker.
    """
    tell = tell or (lambda count: None)
    handle = os.open(job.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _pwrite(handle, job.header, 0)
        os.ftruncate(handle, job.size)  # `zeros` need no work: a hole reads as zeros
        found = _copy_all(job, handle, tell, stop)
        for number, task in enumerate(job.tasks):
            if stop():
                raise Stopped("stopped")
            _compute(job, number, task, handle, tell)
    finally:
        os.close(handle)
    return found


def _steps(copy: Copy) -> Iterator[Copy]:
    """A move in steps, between which somebody may say stop."""
    for i in range(0, copy.count, _STEP):
        count = min(_STEP, copy.count - i)
        yield replace(copy, start=copy.start + i, to=copy.to + i, count=count)


def _copy_all(job: Job, handle: int, tell: Tell, stop: Callable[[], bool]) -> list[Suspect]:
    firsts = [c for c in job.copies if c.first]
    again = [c for c in job.copies if not c.first]  # when what they repeat already stands there
    donors = clone.Donors(firsts) if job.clone else None
    opened = {path: os.open(path, os.O_RDONLY) for path in sorted({c.path for c in job.copies})}
    mover = Mover(handle, watch=job.watch, donors=donors)

    def one(move: Copy) -> None:
        if stop():
            raise Stopped("stopped")
        mover.move(opened[move.path], move)
        tell(move.count)

    try:
        for copies in (firsts, again):
            moves = list(chain.from_iterable(map(_steps, copies)))
            if job.threads > 1 and len(moves) > 1:
                with ThreadPoolExecutor(job.threads) as pool:
                    list(pool.map(one, moves))
            else:
                for move in moves:
                    one(move)
    finally:
        for source in opened.values():
            os.close(source)
    return mover.suspects


class Mover:
    """Moves byte ranges into one file, in the kernel (`copy_file_range`) or through a buffer,
    whichever proves faster.

    Where blocks can be shared or a server copies (XFS, btrfs, NFS) the kernel wins by far; on ext4
    its page-wise splice takes a third longer than a small buffer (6.18, measured), and two threads
    on one file get in each other's way. So the first large ranges are timed, one each way, and the
    faster way does the rest. The bytes are the same.

    With `donors` (what of the sources already stands in the target) blocks are shared first, with
    the target's own or with the source's, until the file system refuses.
    """

    _TIMED = 8 << 20

    def __init__(
        self, target: int, *, watch: bool = False, donors: clone.Donors | None = None
    ) -> None:
        self._target, self._watch, self._donors = target, watch, donors
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
        place = None if copy.first else donors.find(copy)
        for file, start in ((self._target, place), (source, copy.start)):
            if start is None or file in self._refused:
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

    def _edge(self, source: int, copy: Copy, at: int, count: int) -> None:
        """A part of a move that is less than a block."""
        if count:
            done = os.pread(source, count, copy.start + at)
            _some(len(done), copy, at)
            _pwrite(self._target, done, copy.to + at)

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
            _pwrite(self._target, view[:got], copy.to + done)
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


def _pwrite(handle: int, data: Any, position: int) -> None:
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done : done + (1 << 30)], position + done)


def computed(job: Job, number: int, task: Task) -> Iterator[tuple[Piece, Any]]:
    """The outputs of a computed task, as bytes: what `make_shard` writes and what verification
    compares with.
    """
    from moetool.kernels import codec

    inputs = [
        codec.decode(read_range(*where), dtype, piece.shape, job.device)
        for (where, dtype), piece in zip(job.ranges[number], task.inputs, strict=True)
    ]
    for piece, value in ops.run_task(task, inputs, job.dtypes, job.tables):
        yield piece, codec.encode(value, job.dtypes[piece.name])


def _compute(job: Job, number: int, task: Task, handle: int, tell: Tell) -> None:
    for piece, data in computed(job, number, task):
        offset, size = elements(piece, job.dtypes[piece.name])
        _pwrite(handle, data, job.starts[piece.name] + offset)
        tell(size)


def run_local(
    jobs: Sequence[Job],
    done: Callable[[Job, list[Suspect]], None],
    *,
    workers: int,
    tell: Tell,
    stop: threading.Event,
) -> None:
    """Make every job on threads; `done` gives a finished shard its name at once. The first failure
    stops the others.
    """
    failed = threading.Event()

    def stopping() -> bool:
        return stop.is_set() or failed.is_set()

    def one(job: Job) -> None:
        if stopping():
            raise Stopped("stopped")
        try:
            done(job, make_shard(job, tell, stopping))
        except BaseException:
            failed.set()  # at once: the next job of this thread must not begin
            raise

    with ThreadPoolExecutor(max(1, min(workers, len(jobs) or 1))) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            failed.set()
            for future in futures:
                future.cancel()
            raise
