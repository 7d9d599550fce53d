"""Every byte of an output against its sources: copied ranges compared, computed tensors made again
and compared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moetool.data import JsonObject
from moetool.errors import VerificationFailed
from moetool.progress import Progress, Stage, silent
from moetool.surgery import engine, view
from moetool.surgery.checkpoint import Checkpoint, read_range
from moetool.surgery.plan import Plan
from moetool.surgery.spec import Piece, Task

_BLOCK = 8 << 20


@dataclass(frozen=True)
class Against:
    """What an output is compared with: the plan's sources. Those beyond the first `named` do not
    travel with an output: what came from them is compared with its seal in `sealed` (tensor@offset
    -> sha256).
    """

    sources: Sequence[Checkpoint]
    named: int | None = None
    sealed: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"

    def is_beyond(self, task: Task) -> bool:
        """Whether a task reads what is not there any more."""
        named = len(self.sources) if self.named is None else self.named
        return any(view.is_beyond(p, self.sources, named) for p in task.inputs)


def compare_bytes(
    plan: Plan, out: Checkpoint, against: Against, tell: Progress = silent
) -> JsonObject:
    """Walk the plan and compare; returns counts and a sha256 over all copied bytes. Raises
    VerificationFailed at the first difference.
    """
    compared = _Compared(plan, out, against, tell)
    compared.sealed()
    compared.copied()
    compared.zeros()
    compared.computed()
    return compared.as_json()


def compare_moved(plan: Plan, out: Checkpoint, sources: Sequence[Checkpoint]) -> int:
    """Hold the ranges that were only moved against their sources, where those are there; returns
    how many bytes. Raises VerificationFailed at the first difference.
    """
    compared = 0
    for task in plan.tasks:
        for piece, made in zip(task.inputs, task.outputs, strict=False):
            if task.op == "copy" and sources[piece.source].folder:
                compared += _compare_copy(sources[piece.source], piece, out, made)
    return compared


class _Compared:
    """A comparison on its way: what was compared, by how it was made."""

    def __init__(self, plan: Plan, out: Checkpoint, against: Against, tell: Progress) -> None:
        self.plan, self.out, self.against, self._tell = plan, out, against, tell
        self.bytes = 0
        self.counts: Counter[str] = Counter()
        self.seal = hashlib.sha256()

    def _note(self, kind: str, count: int) -> None:
        self.counts[kind] += 1
        self.bytes += count
        self._tell(Stage("compare"), self.bytes, self.plan.size)

    def sealed(self) -> None:
        """What was solved, by its seal."""
        for task in filter(self.against.is_beyond, self.plan.tasks):
            for made in task.outputs:
                seal = self.against.sealed.get(f"{made.name}@{made.offset}")
                self._note("sealed_tensors", _compare_seal(self.out, made, seal))

    def copied(self) -> None:
        """Ranges that were only moved, byte by byte."""
        for task in self.plan.tasks:
            if task.op != "copy" or self.against.is_beyond(task):
                continue
            for piece, made in zip(task.inputs, task.outputs, strict=True):
                source = self.against.sources[piece.source]
                self._note("copied_ranges", _compare_copy(source, piece, self.out, made, self.seal))

    def zeros(self) -> None:
        for task in self.plan.tasks:
            for made in task.outputs if task.op == "zeros" else ():
                _compare_zeros(self.out, made)

    def computed(self) -> None:
        """What was computed, by computing it again."""
        how = engine.How(self.against.device)
        sources, shards = self.against.sources, self.plan.shards
        for job in engine.jobs_of(self.plan, sources, shards, self.out.folder, how):
            for number, task in enumerate(job.tasks):
                if not self.against.is_beyond(task):
                    self._compute(job, number, task)

    def _compute(self, job: engine.Job, number: int, task: Task) -> None:
        for piece, data in engine.computed(job, number, task):
            if bytes(self.out.read(piece)) != bytes(data):
                of = ", ".join(p.name for p in task.inputs) or "a seed"
                raise _different(self.out, piece, f"{task.op} of {of}")
            self._note("computed_tensors", len(data))

    def as_json(self) -> JsonObject:
        sealed = self.counts["sealed_tensors"]
        return {
            "copied_ranges": self.counts["copied_ranges"],
            "copied_sha256": self.seal.hexdigest(),
            "computed_tensors": self.counts["computed_tensors"],
            "bytes_compared": self.bytes,
        } | ({"sealed_tensors": sealed} if sealed else {})


def _compare_copy(
    source: Checkpoint, piece: Piece, out: Checkpoint, made: Piece, seal: Any = None
) -> int:
    path, start, count = source.range_of(piece)
    other, begin, size = out.range_of(made)
    if size != count:
        raise _different(out, made, piece.name)
    for i in range(0, count, _BLOCK):
        step = min(_BLOCK, count - i)
        mine = read_range(other, begin + i, step)
        if mine != read_range(path, start + i, step):
            raise _different(out, made, f"{piece.name} of {source.folder}")
        if seal is not None:
            seal.update(mine)
    return count


def _compare_seal(out: Checkpoint, made: Piece, seal: str | None) -> int:
    data = out.read(made)
    if hashlib.sha256(data).hexdigest() != seal:
        raise _different(out, made, "what was solved when it was made")
    return len(data)


def _compare_zeros(out: Checkpoint, made: Piece) -> None:
    if any(out.read(made)):
        raise _different(out, made, "zeros")


def _different(out: Checkpoint, piece: Piece, expected: str) -> VerificationFailed:
    file = out.stored[piece.name].file if piece.name in out.stored else ""
    return VerificationFailed(
        "bytes are not what the plan makes",
        file=f"{out.folder}/{file}",
        tensor=piece.name,
        expected=f"the bytes of {expected}",
        found="other bytes",
        hint="the output was changed or damaged: make it again",
    )
