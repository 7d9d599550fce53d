"""Find NaN and inf in what a plan reads, at the speed of memory: the largest bit pattern of a float tells.

For bf16, fp16 and fp32 the exponent is all ones exactly for inf and NaN, so a signed and an unsigned maximum over the raw
integers find them without decoding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import Task

_BLOCK = 2 << 20
# dtype -> (unsigned type, signed type, bits of +inf)
_PATTERN = {"BF16": ("<u2", "<i2", 0x7F80), "F16": ("<u2", "<i2", 0x7C00), "F32": ("<u4", "<i4", 0x7F800000), "F64": ("<u8", "<i8", 0x7FF0000000000000)}


@dataclass(frozen=True)
class Bad:
    """A tensor with values that are not finite."""

    file: str
    name: str
    what: str


def not_finite(sources: Sequence[Checkpoint], tasks: Sequence[Task], *, workers: int = 1, tell: Callable[[str, int, int], None] = lambda *a: None, stop: threading.Event | None = None) -> list[Bad]:
    """Every source tensor used by the tasks that holds NaN or inf, in name order."""
    used = sorted({(p.source, p.name) for t in tasks for p in t.inputs})
    runs = _runs(sources, used)
    total, done, lock = sum(stop_ - start for _, start, stop_, _ in runs), [0], threading.Lock()
    suspects: set[tuple[str, int, int, str]] = set()

    def one(run: tuple[str, int, int, str]) -> None:
        if stop is not None and stop.is_set():
            return
        if _has_bad(*run):
            with lock:
                suspects.add(run)
        with lock:
            done[0] += run[2] - run[1]
            tell("check", done[0], total)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(one, runs))
    if not suspects:
        return []
    return [Bad(f"{sources[s].folder}/{sources[s].tensors[n].file}", n, "NaN or inf") for s, n in used if _tensor_is_bad(sources[s], n)]


def _runs(sources: Sequence[Checkpoint], used: Sequence[tuple[int, str]]) -> list[tuple[str, int, int, str]]:
    """Used tensors as (path, start, stop, dtype); neighbours of one dtype joined, long runs cut."""
    places = sorted({(f"{sources[s].folder}/{t.file}", t.start, t.stop, t.dtype) for s, n in used if (t := sources[s].tensor(n)).dtype in _PATTERN})
    joined: list[list[Any]] = []
    for path, start, stop, dtype in places:
        if joined and joined[-1][0] == path and joined[-1][2] == start and joined[-1][3] == dtype and stop - joined[-1][1] < 256 << 20:
            joined[-1][2] = stop
        else:
            joined.append([path, start, stop, dtype])
    return [(p, a, b, d) for p, a, b, d in joined if b > a]


def _has_bad(path: str, start: int, stop: int, dtype: str) -> bool:
    import numpy as np

    unsigned, signed, infinity = _PATTERN[dtype]
    sign = 1 << (8 * int(unsigned[2]) - 1)
    buffer = bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as handle:
        handle.seek(start)
        left = stop - start
        while left > 0:
            view = memoryview(buffer)[: min(_BLOCK, left)]
            got = handle.readinto(view)
            if not got:
                return False
            size = got - got % int(unsigned[2])
            values = np.frombuffer(view[:size], unsigned)
            if size and (int(values.max()) >= sign | infinity or int(values.view(signed).max()) >= infinity):
                return True
            handle.seek(start + (stop - start - left) + size)
            left -= size
    return False


def _tensor_is_bad(source: Checkpoint, name: str) -> bool:
    tensor = source.tensor(name)
    return tensor.dtype in _PATTERN and _has_bad(f"{source.folder}/{tensor.file}", tensor.start, tensor.stop, tensor.dtype)
