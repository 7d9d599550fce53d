"""Make a plan's shards, on threads here or on a Ray cluster: one worker function of plain values
serves both.

Bytes that are only moved go through `copy_file_range` or a small buffer (mover.py); computed
tensors come one task at a time. Nothing is left under a shard's final name until the shard is
whole.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from moetool import atomic
from moetool.errors import MoetoolError, Stopped
from moetool.surgery import between, clone, ops, threads
from moetool.surgery.checkpoint import Checkpoint, Extent, read_range
from moetool.surgery.mover import Copy, Mover, write_at
from moetool.surgery.plan import Plan, Shard, elements
from moetool.surgery.scan import Suspect
from moetool.surgery.spec import Piece, Task

Tell = Callable[[int], None]
_STEP = 64 << 20  # between two looks at the stop flag


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
    NaN and inf in what is copied; `clone`: share blocks where the file system can, with those of
    `finished` shards in the same folder too.
    """

    device: str = "cpu"
    threads: int = 1
    watch: bool = False
    clone: bool = True
    finished: tuple[Shard, ...] = ()

    def part(self, share: float) -> How:
        """For a shard that is this share of the work."""
        return replace(self, threads=max(1, round(self.threads * share)))


def jobs_of(
    plan: Plan,
    sources: Sequence[Checkpoint],
    shards: Sequence[Shard],
    folder: str,
    how: How = How(),
) -> Iterator[Job]:
    """The work of the given shards."""
    everything = sum(s.size for s in shards) or 1
    jobs = (_job(plan, sources, s, folder, how.part(s.size / everything)) for s in shards)
    there = [_job(plan, sources, s, folder, how) for s in how.finished]
    yield from between.linked(list(jobs), there) if there else jobs


def _job(plan: Plan, sources: Sequence[Checkpoint], shard: Shard, folder: str, how: How) -> Job:
    header = plan.header(shard)
    starts = {name: len(header) + start for name, (start, _) in shard.offsets.items()}
    dtypes = {name: plan.targets[name].dtype for name in shard.offsets}
    tasks = [plan.tasks[i] for i in shard.tasks]
    computed = tuple(t for t in tasks if ops.OPS[t.op].run is not None)
    used = sorted(set(chain.from_iterable(map(ops.tables_of, computed))))
    return Job(
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
        how.threads,
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
    job: Job,
    tell: Tell | None = None,
    stop: Callable[[], bool] = lambda: False,
    turns: between.Turns | None = None,
) -> list[Suspect]:
    """Write one shard under its temporary name; returns ranges with NaN or inf. Runs in a thread
    or in a Ray worker. `turns`: who has written what others share.
    """
    tell = tell or (lambda count: None)
    handle = os.open(job.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_at(handle, job.header, 0)
        os.ftruncate(handle, job.size)  # `zeros` need no work: a hole reads as zeros
        found = _copy_all(job, handle, _During(tell, stop, turns or between.Turns()))
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
        yield copy.part(i, min(_STEP, copy.count - i))


@dataclass(frozen=True)
class _During:
    """Who hears of a shard while it is made, can stop it, and waits for it."""

    tell: Tell
    stop: Callable[[], bool]
    turns: between.Turns


def _copy_all(job: Job, handle: int, during: _During) -> list[Suspect]:
    own = [c for c in job.copies if c.first and not c.elsewhere]
    shared = [c for c in job.copies if c.elsewhere]
    again = [c for c in job.copies if not c.first]  # when what they repeat already stands there
    files = sorted({c.elsewhere.file for c in shared if c.elsewhere})
    donors = clone.Donors(own + shared) if job.clone else None
    opened = {path: os.open(path, os.O_RDONLY) for path in sorted({c.path for c in job.copies})}
    others: dict[str, int] = {}
    mover = Mover(handle, watch=job.watch, donors=donors, others=others)

    def one(move: Copy) -> None:
        if during.stop():
            raise Stopped("stopped")
        mover.move(opened[move.path], move)
        during.tell(move.count)

    try:
        _all(own, one, job.threads)
        during.turns.written(job.path)
        for file in files:
            during.turns.wait(file, during.stop)
            others[file] = between.opened(file)
        _all(shared, one, job.threads)
        _all(between.cut(again, shared), one, job.threads)
    finally:
        for source in (*opened.values(), *others.values()):
            os.close(source)
    return mover.suspects


def _all(copies: Sequence[Copy], one: Callable[[Copy], None], workers: int) -> None:
    moves = list(chain.from_iterable(map(_steps, copies)))
    if workers > 1 and len(moves) > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, moves))
        return
    for move in moves:
        one(move)


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
        write_at(handle, data, job.starts[piece.name] + offset)
        tell(size)


def _threads(jobs: Sequence[Job]) -> AbstractContextManager[None]:
    """One thread of torch for each worker, where nothing but forms of matrices is computed."""
    done = {task.op for task in chain.from_iterable(job.tasks for job in jobs)}
    return threads.single() if done and done <= {"reform", "repeat"} else nullcontext()


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
    failed, jobs = threading.Event(), between.linked(jobs, ())
    turns = between.Turns(jobs)

    def stopping() -> bool:
        return stop.is_set() or failed.is_set()

    def one(job: Job) -> None:
        if stopping():
            raise Stopped("stopped")
        try:
            done(job, make_shard(job, tell, stopping, turns))
        except BaseException:
            failed.set()  # at once: the next job of this thread must not begin
            raise

    with _threads(jobs), ThreadPoolExecutor(max(1, min(workers, len(jobs) or 1))) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            failed.set()
            for future in futures:
                future.cancel()
            raise
