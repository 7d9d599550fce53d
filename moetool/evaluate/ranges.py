"""Every byte of an output against its sources: copied ranges compared, computed tensors made again
and compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from moetool.errors import VerificationFailed
from moetool.progress import Progress, Stage, silent
from moetool.surgery import engine
from moetool.surgery.checkpoint import Checkpoint, read_range
from moetool.surgery.plan import Plan
from moetool.surgery.spec import Piece

_BLOCK = 8 << 20


def compare_bytes(
    plan: Plan,
    sources: Sequence[Checkpoint],
    out: Checkpoint,
    *,
    named: int | None = None,
    sealed: Mapping[str, str] | None = None,
    device: str = "cpu",
    tell: Progress = silent,
) -> dict[str, Any]:
    """Walk the plan and compare; returns counts and a sha256 over all copied bytes. Raises
    VerificationFailed at the first difference.

    What came from sources beyond the first `named` (they do not travel with an output) is compared
    with its recorded seal.
    """
    total, done, kept = plan.size, 0, 0
    beyond = {
        id(t) for t in plan.tasks if named is not None and any(p.source >= named for p in t.inputs)
    }
    for task in plan.tasks:
        if id(task) in beyond:
            for made in task.outputs:
                done += _compare_seal(out, made, (sealed or {}).get(f"{made.name}@{made.offset}"))
                kept += 1
    copied, seal = 0, hashlib.sha256()
    for task in plan.tasks:
        if task.op != "copy" or id(task) in beyond:
            continue
        for source, made in zip(task.inputs, task.outputs, strict=True):
            done += _compare_copy(sources[source.source], source, out, made, seal)
            copied += 1
            tell(Stage("compare"), done, total)
    for task in plan.tasks:
        if task.op == "zeros":
            for made in task.outputs:
                _compare_zeros(out, made)
    computed = 0
    for job in engine.jobs_of(plan, sources, plan.shards, out.folder, engine.How(device)):
        for number, task in enumerate(job.tasks):
            if id(task) in beyond:
                continue
            for piece, data in engine.computed(job, number, task):
                if bytes(out.read(piece)) != bytes(data):
                    raise _different(
                        out,
                        piece,
                        f"{task.op} of {', '.join(p.name for p in task.inputs) or 'a seed'}",
                    )
                computed += 1
                done += len(data)
                tell(Stage("compare"), done, total)
    return {
        "copied_ranges": copied,
        "copied_sha256": seal.hexdigest(),
        "computed_tensors": computed,
        "bytes_compared": done,
    } | ({"sealed_tensors": kept} if kept else {})


def _compare_copy(source: Checkpoint, piece: Piece, out: Checkpoint, made: Piece, seal: Any) -> int:
    path, start, count = source.range_of(piece)
    other, begin, size = out.range_of(made)
    if size != count:
        raise _different(out, made, piece.name)
    for i in range(0, count, _BLOCK):
        step = min(_BLOCK, count - i)
        mine = read_range(other, begin + i, step)
        if mine != read_range(path, start + i, step):
            raise _different(out, made, f"{piece.name} of {source.folder}")
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
