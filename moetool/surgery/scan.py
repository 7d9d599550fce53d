"""Find NaN and inf in what a plan reads, at the speed of memory: the largest bit pattern of a
float tells.

The largest bit patterns of a float are exactly inf and NaN, so a signed and an
unsigned maximum over the raw integers find them without decoding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from moetool.errors import MoetoolError
from moetool.progress import Progress, Stage, silent
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import Stored, Task, whole

Suspect = tuple[str, int, int, str]  # (path, start, stop, dtype)
_BLOCK = 1 << 19
# dtype -> (unsigned type, signed type, bits of +inf)
_PATTERN = {
    "BF16": ("<u2", "<i2", 0x7F80),
    "F16": ("<u2", "<i2", 0x7C00),
    "F32": ("<u4", "<i4", 0x7F800000),
    "F64": ("<u8", "<i8", 0x7FF0000000000000),
    "F8_E4M3": ("<u1", "<i1", 0x7F),  # has no inf; NaN alone
    "F8_E5M2": ("<u1", "<i1", 0x7C),
}


@dataclass(frozen=True)
class Bad:
    """A tensor with values that are not finite."""

    file: str
    name: str
    what: str


def suspects(
    sources: Sequence[Checkpoint],
    tasks: Sequence[Task],
    *,
    workers: int = 1,
    tell: Progress = silent,
    stop: threading.Event | None = None,
) -> set[Suspect]:
    """The byte ranges read by the tasks that hold NaN or inf."""
    runs = _runs(sources, _used(tasks))
    total, done, lock = sum(stop_ - start for _, start, stop_, _ in runs), [0], threading.Lock()
    found: set[Suspect] = set()

    def one(run: Suspect) -> None:
        if stop is not None and stop.is_set():
            return
        if _has_bad(*run):
            with lock:
                found.add(run)
        with lock:
            done[0] += run[2] - run[1]
            tell(Stage("check"), done[0], total)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(one, runs))
    return found


def _used(tasks: Sequence[Task]) -> list[tuple[int, str]]:
    """(source, name) of everything that the tasks read."""
    pieces = chain.from_iterable(task.inputs for task in tasks)
    return sorted({(p.source, p.name) for p in pieces})


def _runs(sources: Sequence[Checkpoint], used: Sequence[tuple[int, str]]) -> list[Suspect]:
    """Used tensors as (path, start, stop, dtype); neighbours of one dtype joined, long runs cut."""
    places = sorted(
        {
            (*_range(sources[s], t), t.dtype)
            for s, n in used
            if (t := sources[s].part(n)).dtype in _PATTERN
        }
    )
    joined: list[list[Any]] = []
    for path, start, stop, dtype in places:
        if (
            joined
            and joined[-1][0] == path
            and joined[-1][2] == start
            and joined[-1][3] == dtype
            and stop - joined[-1][1] < 256 << 20
        ):
            joined[-1][2] = stop
        else:
            joined.append([path, start, stop, dtype])
    return [(p, a, b, d) for p, a, b, d in joined if b > a]


class _Range(NamedTuple):
    """Bytes start:stop of a file."""

    path: str
    start: int
    stop: int


def _range(source: Checkpoint, tensor: Stored) -> _Range:
    path, start, size = source.place(tensor)
    return _Range(path, start, start + size)


def _has_bad(path: str, start: int, stop: int, dtype: str) -> bool:
    buffer = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as handle:
        for position in range(start, stop, _BLOCK):
            view = buffer[: min(_BLOCK, stop - position)]
            handle.seek(position)
            got = handle.readinto(view)
            if bad_block(view[: got or 0], dtype):
                return True
    return False


def bad_ranges(path: str, start: int, stop: int, dtype: str) -> list[Suspect]:
    """The range itself, as a list of one, if it holds NaN or inf."""
    return (
        [(path, start, stop, dtype)]
        if dtype in _PATTERN and _has_bad(path, start, stop, dtype)
        else []
    )


def bad_block(data: memoryview, dtype: str) -> bool:
    """Whether any whole value in these bytes is NaN or inf; False for dtypes that have neither."""
    import numpy as np

    if dtype not in _PATTERN:
        return False
    unsigned, signed, infinity = _PATTERN[dtype]
    width = int(unsigned[2])
    values = np.frombuffer(data, unsigned, count=len(data) // width)
    return bool(len(values)) and (
        int(values.max()) >= 1 << (8 * width - 1) | infinity
        or int(values.view(signed).max()) >= infinity
    )


def named(
    sources: Sequence[Checkpoint], tasks: Sequence[Task], suspects: Iterable[Suspect]
) -> list[Bad]:
    """The tensors that make byte ranges suspect, each looked at once more, in name order."""
    ranges = sorted(set(suspects))
    found = []
    for source, name in _used(tasks):
        tensor = sources[source].part(name)
        path, start, stop = _range(sources[source], tensor)
        touched = any(r[0] == path and r[1] < stop and start < r[2] for r in ranges)
        if touched and _has_bad(path, start, stop, tensor.dtype):
            found.append(Bad(path, name, "NaN or inf"))
    return found


def everything(sources: Sequence[Checkpoint]) -> list[Task]:
    """Tasks that read all there is."""
    numbered = enumerate(sources)
    return [
        Task("copy", tuple(whole(t, number) for t in source.stored.values()), ())
        for number, source in numbered
    ]


def check_finite(
    sources: Sequence[Checkpoint],
    tasks: Sequence[Task],
    tell: Progress,
    stop: threading.Event,
    *,
    workers: int = 1,
) -> None:
    """With --strict everything that is read is looked at before a byte is written."""
    found = suspects(sources, tasks, workers=workers, tell=tell, stop=stop)
    bad = named(sources, tasks, found) if found else []
    if bad:
        raise MoetoolError(
            "weights are not finite",
            file=bad[0].file,
            tensor=bad[0].name,
            found=f"{bad[0].what}, in {len(bad)} tensors",
            expected="finite values",
            hint="repair the checkpoint, or leave out --strict",
        )
