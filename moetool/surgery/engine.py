"""Make a plan's shards, on threads here or on a Ray cluster: one worker function of plain values serves both.

Bytes that are only moved go through `copy_file_range` (pread/pwrite where the file system refuses); computed tensors
come one task at a time. Nothing is left under a shard's final name until the shard is whole.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from moetool.errors import MoetoolError, Stopped
from moetool.surgery import ops
from moetool.surgery.checkpoint import Checkpoint, read_range
from moetool.surgery.plan import Plan, Shard, elements
from moetool.surgery.spec import Piece, Task

Tell = Callable[[int], None]
_STEP = 64 << 20  # between two looks at the stop flag
_NO_RANGE_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


@dataclass(frozen=True)
class Job:
    """All a worker needs to make one shard, as values."""

    path: str  # the shard's temporary name, on a file system that the worker sees
    header: bytes
    size: int  # of the whole file
    copies: tuple[tuple[str, int, int, int], ...]  # (source file, from, to, count), absolute byte positions
    tasks: tuple[Task, ...]
    dtypes: dict[str, str]
    starts: dict[str, int]  # where each tensor begins in the file
    ranges: tuple[tuple[tuple[str, int, int, str], ...], ...]  # per task and input: file, from, count, dtype
    tables: dict[str, list[int]]
    device: str
    threads: int


def jobs_of(plan: Plan, sources: Sequence[Checkpoint], shards: Sequence[Shard], folder: str, *, device: str = "cpu", threads: int = 1) -> Iterator[Job]:
    """The work of the given shards."""
    for shard in shards:
        header = plan.header(shard)
        starts = {name: len(header) + start for name, (start, _) in shard.offsets.items()}
        dtypes = {name: plan.targets[name].dtype for name in shard.offsets}
        tasks = [plan.tasks[i] for i in shard.tasks]
        computed = tuple(t for t in tasks if ops.OPS[t.op].run is not None)
        ranges = tuple(tuple((*sources[p.source].range_of(p), sources[p.source].tensor(p.name).dtype) for p in t.inputs) for t in computed)
        used = {t.params["order"] for t in computed if t.params.get("order")}
        yield Job(
            os.path.join(folder, shard.name + ".tmp"), header, len(header) + shard.size,
            tuple(_copies(tasks, sources, starts, dtypes)), computed, dtypes, starts, ranges,
            {k: plan.tables[k] for k in used}, device, threads,
        )  # fmt: skip


def _copies(tasks: Sequence[Task], sources: Sequence[Checkpoint], starts: dict[str, int], dtypes: dict[str, str]) -> Iterator[tuple[str, int, int, int]]:
    """Byte moves, neighbours joined."""
    last: tuple[str, int, int, int] | None = None
    for task in tasks:
        if task.op != "copy":
            continue
        for source, out in zip(task.inputs, task.outputs, strict=True):
            path, start, count = sources[source.source].range_of(source)
            offset, size = elements(out, dtypes[out.name])
            if size != count:
                raise MoetoolError("a copy changes size", tensor=out.name, expected=f"{size} bytes", found=f"{count} bytes", hint="report this as a bug of moetool")
            to = starts[out.name] + offset
            if last and last[0] == path and last[1] + last[3] == start and last[2] + last[3] == to:
                last = (path, last[1], last[2], last[3] + count)
                continue
            if last:
                yield last
            last = (path, start, to, count)
    if last:
        yield last


def make_shard(job: Job, tell: Tell | None = None, stop: Callable[[], bool] = lambda: False) -> int:
    """Write one shard under its temporary name; returns the bytes written. Runs in a thread or in a Ray worker."""
    tell = tell or (lambda count: None)
    handle = os.open(job.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _pwrite(handle, job.header, 0)
        os.ftruncate(handle, job.size)  # `zeros` need no work: a hole reads as zeros
        _copy_all(job, handle, tell, stop)
        for number, task in enumerate(job.tasks):
            if stop():
                raise Stopped("stopped")
            _compute(job, number, task, handle, tell)
    finally:
        os.close(handle)
    return job.size


def _copy_all(job: Job, handle: int, tell: Tell, stop: Callable[[], bool]) -> None:
    moves = [(path, a + i, b + i, min(_STEP, count - i)) for path, a, b, count in job.copies for i in range(0, count, _STEP)]
    opened = {path: os.open(path, os.O_RDONLY) for path in sorted({m[0] for m in moves})}
    try:

        def one(move: tuple[str, int, int, int]) -> None:
            if stop():
                raise Stopped("stopped")
            _move(opened[move[0]], handle, *move)
            tell(move[3])

        if job.threads > 1 and len(moves) > 1:
            with ThreadPoolExecutor(job.threads) as pool:
                list(pool.map(one, moves))
        else:
            for move in moves:
                one(move)
    finally:
        for source in opened.values():
            os.close(source)


def _move(source: int, target: int, path: str, start: int, to: int, count: int) -> None:
    done = 0
    in_kernel = hasattr(os, "copy_file_range")
    while done < count:
        if in_kernel:
            try:
                got = os.copy_file_range(source, target, count - done, start + done, to + done)
            except OSError as problem:
                if problem.errno not in _NO_RANGE_COPY:
                    raise
                in_kernel = False
                continue
        else:
            block = os.pread(source, min(ops.COPY_BUFFER, count - done), start + done)
            got = len(block)
            _pwrite(target, block, to + done)
        if got == 0:
            raise MoetoolError("the file became shorter while it was read", file=path, expected=f"{start + count} bytes", found=f"{start + done} bytes", hint="do not change a source while moetool works on it")
        done += got


def _pwrite(handle: int, data: Any, position: int) -> None:
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done : done + (1 << 30)], position + done)


def computed(job: Job, number: int, task: Task) -> Iterator[tuple[Piece, Any]]:
    """The outputs of a computed task, as bytes: what `make_shard` writes and what verification compares with."""
    from moetool.kernels import codec

    inputs = [codec.decode(read_range(path, start, count), dtype, piece.shape, job.device) for (path, start, count, dtype), piece in zip(job.ranges[number], task.inputs, strict=True)]
    for piece, value in ops.run_task(task, inputs, job.dtypes, job.tables):
        yield piece, codec.encode(value, job.dtypes[piece.name])


def _compute(job: Job, number: int, task: Task, handle: int, tell: Tell) -> None:
    for piece, data in computed(job, number, task):
        offset, size = elements(piece, job.dtypes[piece.name])
        _pwrite(handle, data, job.starts[piece.name] + offset)
        tell(size)


def run_local(jobs: Sequence[Job], done: Callable[[Job], None], *, workers: int, tell: Tell, stop: threading.Event) -> None:
    """Make every job on threads; `done` runs in this thread after each. The first failure stops the others."""
    if not jobs:
        return
    with ThreadPoolExecutor(max(1, min(workers, len(jobs)))) as pool:
        failed = threading.Event()
        futures = {pool.submit(make_shard, job, tell, lambda: stop.is_set() or failed.is_set()): job for job in jobs}
        try:
            for future, job in futures.items():
                while not future.done() and not stop.is_set():
                    _wait(future)
                future.result()
                done(job)
        except BaseException:
            failed.set()
            for future in futures:
                future.cancel()
            raise


def _wait(future: Any) -> None:
    from concurrent.futures import wait

    wait([future], timeout=0.2)
