"""Bytes that several shards hold are written in one of them, and shared by the others where the
file system can: copies of an FFN that do not fit into one shard take no disk either.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from moetool import atomic
from moetool.errors import Stopped
from moetool.surgery import clone
from moetool.surgery.mover import Copy, Standing


class Shared(Protocol):
    """The work of a shard, as far as it moves bytes."""

    @property
    def path(self) -> str: ...
    @property
    def copies(self) -> tuple[Copy, ...]: ...
    @property
    def clone(self) -> bool: ...


Work = TypeVar("Work", bound=Shared)


class _Run(NamedTuple):
    """Bytes [start, stop) of a source stand in `file` from `to` on."""

    start: int
    stop: int
    file: str
    to: int


class _Runs:
    """What of the sources stands in which shard."""

    def __init__(self) -> None:
        self._runs: dict[str, list[_Run]] = {}  # of a source's file, in order, never overlapping

    def parts(self, move: Copy) -> Iterator[tuple[Copy, bool]]:
        """A move in parts, and whether each stands somewhere; `elsewhere` says where, if its blocks
        lie alike.
        """
        runs, at, end = self._runs.get(move.path, []), move.start, move.start + move.count
        number = max(0, bisect_right(runs, (at, 1 << 62)) - 1)
        while at < end:
            run = next((r for r in runs[number : number + 2] if r.stop > at), None)
            known = run is not None and run.start <= at
            stop = end
            if run is not None:
                stop = min(end, run.stop if known else run.start)
            part = move.part(at - move.start, stop - at)
            if run is not None and known:
                place = Standing(run.file, run.to + at - run.start)
                alike = clone.blocks_of(place.start, part.to, part.count)[1]
                part = replace(part, elsewhere=place if alike else None)
                number += 1
            yield part, known
            at = stop

    def add(self, moves: Iterable[Copy], file: str) -> None:
        """These moves stand in a file from now on."""
        for move in moves:
            for part, known in list(self.parts(move)):
                if not known:
                    run = _Run(part.start, part.start + part.count, file, part.to)
                    insort(self._runs.setdefault(part.path, []), run)


def linked(jobs: Sequence[Work], there: Sequence[Shared]) -> list[Work]:
    """The same jobs, told what of their bytes stands in `there`, which is finished, or will stand
    in an earlier one of them; as they are where no blocks can be shared.
    """
    if not any(job.clone for job in jobs) or not clone.works_in(Path(jobs[0].path).parent):
        return list(jobs)
    standing, told = _Runs(), []
    for job in there:
        standing.add(_firsts(job), final(job.path))
    for job in jobs:
        copies: list[Copy] = []
        for copy in job.copies:
            fresh = copy.first and not copy.elsewhere
            parts = [part for part, _ in standing.parts(copy)] if fresh else [copy]
            copies += parts if any(part.elsewhere for part in parts) else [copy]
        standing.add(_firsts(job), final(job.path))
        told.append(replace(job, copies=tuple(copies)))  # type: ignore[type-var]
    return told


def _firsts(job: Shared) -> list[Copy]:
    return [copy for copy in job.copies if copy.first and not copy.elsewhere]


def final(path: str) -> str:
    """A shard's name, of its temporary one."""
    return path.removesuffix(atomic.SUFFIX)


def cut(moves: Sequence[Copy], shared: Sequence[Copy]) -> list[Copy]:
    """Moves of bytes that stand in their target already, each in parts that were written by one
    move alone: what is shared was cut where others lie.
    """
    edges: dict[str, set[int]] = {}
    for copy in shared:
        edges.setdefault(copy.path, set()).update((copy.start, copy.start + copy.count))
    found: list[Copy] = []
    for move in moves:
        inside = (e - move.start for e in edges.get(move.path, ()))
        places = [0, *sorted(e for e in inside if 0 < e < move.count), move.count]
        found += [move.part(a, b - a) for a, b in pairwise(places)]
    return found


class Turns:
    """Who has written its own bytes. A job takes those of others when they stand; jobs begin in
    their order, so nobody waits for one that has not begun.
    """

    def __init__(self, jobs: Sequence[Shared] = ()) -> None:
        self._written = {final(job.path): threading.Event() for job in jobs}

    def written(self, path: str) -> None:
        """A job's own bytes stand."""
        if event := self._written.get(final(path)):
            event.set()

    def wait(self, file: str, stop: Callable[[], bool]) -> None:
        """Until a shard's own bytes stand; Stopped where somebody says stop."""
        event = self._written.get(file)
        while event is not None and not event.wait(0.2):
            if stop():
                raise Stopped("stopped")


def opened(file: str) -> int:
    """A shard, open to be read, whether it has its name or gets it meanwhile."""
    for name in (file, file + atomic.SUFFIX):
        try:
            return os.open(name, os.O_RDONLY)
        except FileNotFoundError:
            continue
    return os.open(file, os.O_RDONLY)
