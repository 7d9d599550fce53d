"""The promise of memory: how many workers keep it, and how much is promised before any work."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from moetool.errors import MoetoolError
from moetool.surgery import ops
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.plan import Plan


@dataclass(frozen=True)
class Fitted:
    """How many workers keep the promise, and what is promised, in bytes."""

    jobs: int
    peak: int


def fit(plan: Plan, sources: Sequence[Checkpoint], jobs: int, memory: int | None) -> Fitted:
    """The most workers (of `jobs`; 0: as many as there are cores) that stay within `memory` bytes;
    MoetoolError when one is too many.
    """
    costs = _costs(plan, sources)
    base = _base(plan, sources)
    for workers in range(jobs or os.cpu_count() or 1, 0, -1):
        peak = base + sum(costs[:workers])
        if memory is None or peak <= memory:
            return Fitted(workers, peak)
    raise MoetoolError(
        "the work does not fit into --memory",
        expected=f"at least {base + costs[0]:,} bytes",
        found=f"{memory:,} bytes",
        hint=f"the widest task needs {costs[0]:,} bytes; raise --memory",
    )


def _base(plan: Plan, sources: Sequence[Checkpoint]) -> int:
    """What is held whatever is done: libraries (numpy looks for NaN in every run), headers and the
    plan itself, measured.
    """
    torch = ops.TORCH_RESERVE if ops.needs(plan.tasks) == "torch" else 0
    held = 600 * sum(len(s.tensors) for s in sources) + 2500 * len(plan.tasks)
    return ops.RESERVE + ops.NUMPY_RESERVE + torch + held


def _costs(plan: Plan, sources: Sequence[Checkpoint]) -> list[int]:
    """Bytes of each task, the widest first."""
    dtypes = {n: t.dtype for n, t in plan.targets.items()}
    size = lambda p: sources[p.source].range_of(p)[2]  # noqa: E731
    return sorted((ops.task_memory(t, dtypes, size) for t in plan.tasks), reverse=True) or [0]


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
