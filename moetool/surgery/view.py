"""What a plan would write, as a checkpoint that can be read before it is written: so that the next
step of a recipe begins without a model in between.

An output that is one run of a source's bytes is read where it lies. Everything else (router rows
put together, solved and computed tensors) is made into files of its own, by the usual writer. The
checkpoint says the headers that the output would have: a plan that reads it is, to the digest, the
one that would read the output from its folder.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from moetool.data import JsonObject
from moetool.progress import Progress, Stage, silent
from moetool.surgery import engine, ops, promise
from moetool.surgery.checkpoint import Checkpoint, Extent
from moetool.surgery.headers import WeightFiles
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import Piece, Stored, Task
from moetool.surgery.writer import Writer


def beyond(tasks: Sequence[Task], sources: Sequence[Checkpoint], named: int) -> frozenset[str]:
    """Names of the tensors made of what does not travel with an output: of sources beyond the first
    `named` (what was solved), or of tensors that stem from such.
    """
    made = (t.outputs for t in tasks if any(is_beyond(p, sources, named) for p in t.inputs))
    found = {piece.name for piece in chain.from_iterable(made)}
    grown = True
    while grown:  # what one task computes belongs together
        near = (t for t in tasks if t.op != "copy" and any(o.name in found for o in t.outputs))
        more = {o.name for o in chain.from_iterable(t.outputs for t in near)} - found
        found, grown = found | more, bool(more)
    return frozenset(found)


def is_beyond(piece: Piece, sources: Sequence[Checkpoint], named: int) -> bool:
    """Whether the bytes of a piece come of what does not travel with an output."""
    return piece.source >= named or piece.name in sources[piece.source].beyond


@dataclass(frozen=True)
class Parted:
    """The outputs of a plan: those that are one run of a source's bytes, and the plan that makes
    the others (None: there are none).
    """

    runs: Mapping[str, Piece]
    rest: Plan | None


def parted(plan: Plan, without: Collection[str] = ()) -> Parted:
    """Part a plan; outputs in `without` are in neither part."""
    makers: dict[str, list[tuple[Task, int]]] = {}
    for task in plan.tasks:
        for number, out in enumerate(task.outputs):
            makers.setdefault(out.name, []).append((task, number))
    runs = {
        name: made[0][0].inputs[made[0][1]]
        for name, made in makers.items()
        if len(made) == 1 and made[0][0].op == "copy" and name not in without
    }
    left = {n: t for n, t in plan.targets.items() if n not in runs and n not in without}
    if not left:
        return Parted(runs, None)
    tasks = list(chain.from_iterable(_only(task, left) for task in plan.tasks))
    wanted = Outputs(plan.config, list(left.values()), tasks, {})
    rest = Plan.build(plan.sources, wanted, max_shard=1 << 62, tables=plan.tables)
    return Parted(runs, rest)


def _only(task: Task, names: Collection[str]) -> Iterator[Task]:
    """What of a task makes these outputs: all of what computes, single moves."""
    if task.op not in ("copy", "zeros"):
        if any(out.name in names for out in task.outputs):
            yield task
        return
    for number, out in enumerate(task.outputs):
        if out.name in names:
            yield replace(task, inputs=task.inputs[number : number + 1], outputs=(out,))


@dataclass(frozen=True)
class Means:
    """How the rest of a plan is made: workers (0: as many as fit), bytes, device."""

    folder: Path
    jobs: int = 0
    memory: int | None = None
    device: str = "cpu"
    sync: bool = True
    tell: Progress = silent
    stop: threading.Event | None = None


@dataclass(frozen=True)
class Between:
    """What lies between two steps, to be read, and the promised peak of making its files."""

    files: Checkpoint
    peak: int


def make(plan: Plan, sources: Sequence[Checkpoint], how: Means) -> Between:
    """Write the rest of a plan (see `parted`) into a folder; what an earlier run left is taken up.
    Raises MoetoolError as every plan that runs.
    """
    ops.rehearse(plan.tasks, lambda p: sources[p.source].part(p.name).dtype, plan.tables)
    fitted = promise.fit(plan, sources, how.jobs, how.memory)
    how.folder.mkdir(parents=True, exist_ok=True)
    stage, total = Stage("write"), sum(s.size for s in plan.shards)
    there = [s for s in sources if s.folder]  # `verify` knows of some the headers alone
    with Writer(how.folder / "rest", plan, sources=there, sync=how.sync) as writer:
        writer.check()
        todo = [s for s in plan.shards if not writer.is_done(s)]
        device = engine.How(how.device, fitted.jobs)
        jobs = list(engine.jobs_of(plan, sources, todo, str(writer.staging), device))
        engine.run_local(
            jobs,
            lambda job, _: writer.publish(job.path),
            workers=fitted.jobs,
            tell=lambda count: how.tell(stage, min(count, total), total),
            stop=how.stop or threading.Event(),
        )
        return Between(_opened(writer.staging, [s.name for s in plan.shards]), fitted.peak)


def _opened(folder: Path, names: Sequence[str]) -> Checkpoint:
    """The tensors of finished files as they lie, whatever they are parts of."""
    read = WeightFiles.read(folder, list(names))
    return Checkpoint(str(folder), {}, read.tensors, read.files)


def of(
    plan: Plan,
    sources: Sequence[Checkpoint],
    runs: Mapping[str, Piece],
    rest: Checkpoint | None,
    gone: Collection[str],
) -> Checkpoint:
    """What the plan would write, read from its sources (`runs`, of `parted`) and from the files of
    its rest. `gone`: outputs that stem from what does not travel with an output; where they are in
    neither, only their headers are known.
    """
    tensors: dict[str, Stored] = {}
    files: dict[str, tuple[int, str]] = {}
    places: dict[str, Extent] = {}
    for shard in plan.shards:
        header = plan.header(shard)
        files[shard.name] = (len(header) + shard.size, hashlib.sha256(header).hexdigest())
        for name in sorted(shard.offsets, key=lambda n: shard.offsets[n]):
            target, (start, stop) = plan.targets[name], shard.offsets[name]
            place = (shard.name, len(header) + start, len(header) + stop)
            tensors[name] = Stored(name, target.dtype, target.shape, *place)
            places[name] = _place(name, sources, runs, rest)
    config: JsonObject = json.loads(json.dumps(plan.config))  # as it would be read again
    seen = Checkpoint.seen(sources[0].folder, config, WeightFiles(tensors, files), places)
    under = (*sources, *([rest] if rest else ()))
    return replace(seen, under=under, beyond=frozenset(gone))


def _place(
    name: str, sources: Sequence[Checkpoint], runs: Mapping[str, Piece], rest: Checkpoint | None
) -> Extent:
    """Where an output's bytes lie; no path where they are not to be had any more."""
    if name in runs:
        return sources[runs[name].source].range_of(runs[name])
    if rest is None or name not in rest.tensors:
        return Extent("", 0, 0)
    return rest.place(rest.tensors[name])
