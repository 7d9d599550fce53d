"""Making the shards of a plan that are not there yet, on threads or a cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from moetool.errors import MoetoolError, Stopped
from moetool.methods.prepared import Prepared
from moetool.progress import Progress, Stage
from moetool.surgery import engine, scan
from moetool.surgery.plan import Shard
from moetool.surgery.writer import Writer


@dataclass(frozen=True)
class Shards:
    """What making the shards showed."""

    resumed: int  # files that were there already
    findings: tuple[str, ...] = ()  # weights that are not finite
    nodes: tuple[str, ...] = ()  # of the Ray cluster


def make(prepared: Prepared, writer: Writer, tell: Progress, stop: threading.Event) -> Shards:
    """Every shard that is not there yet, on threads or a cluster."""
    plan, sources, said = prepared.plan, prepared.sources, prepared.options.common
    todo = [s for s in plan.shards if not writer.is_done(s)]
    found = _look(prepared, todo, tell, stop)
    total = sum(s.size for s in plan.shards)
    state = _Counter(tell, total, total - sum(s.size for s in todo))
    jobs = engine.jobs_of(
        plan,
        sources,
        todo,
        str(writer.staging),
        engine.How(
            said.device,
            prepared.jobs,
            watch=not said.strict,
            clone=said.clone,
            finished=tuple(s for s in plan.shards if s not in todo),
        ),
    )

    def done(job: engine.Job, seen: list[scan.Suspect]) -> None:
        writer.publish(job.path)
        found.extend(seen)

    nodes = _run(prepared, list(jobs), done, state, stop)
    named = scan.named(sources, plan.tasks, found) if found else []
    findings = tuple(f"{b.file}: {b.name} holds {b.what}" for b in named)
    return Shards(len(plan.shards) - len(todo), findings, tuple(nodes))


class _Counter:
    """Adds up bytes from many threads."""

    def __init__(self, tell: Progress, total: int, done: int) -> None:
        self._tell, self._total, self._done = tell, total, done
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._tell(Stage("write"), min(self._done, self._total), self._total)


def _run(
    prepared: Prepared,
    jobs: list[engine.Job],
    done: Callable[[engine.Job, list[scan.Suspect]], None],
    tell: engine.Tell,
    stop: threading.Event,
) -> list[str]:
    """All jobs; the nodes that took part, where a cluster did it."""
    said, out = prepared.options.common, prepared.options.out
    try:
        if said.engine == "ray":
            from moetool.surgery.engine_ray import run_ray

            return run_ray(jobs, done, address=said.ray_address or None, tell=tell, stop=stop)
        engine.run_local(jobs, done, workers=prepared.jobs, tell=tell, stop=stop)
    except Stopped:
        raise Stopped(
            "stopped; finished shards are kept",
            file=out,
            hint="run the same command again to go on",
        ) from None
    except OSError as problem:
        raise MoetoolError(
            f"writing failed: {problem.strerror or problem}",
            file=out,
            hint="finished shards are kept: mend the cause and run the same command again",
        ) from None
    return []


def _look(
    prepared: Prepared, todo: Sequence[Shard], tell: Progress, stop: threading.Event
) -> list[scan.Suspect]:
    """NaN and inf in what the copies of this run will not see: inputs of computed tasks, and
    shards that were there already.
    """
    if prepared.options.common.strict or prepared.made.promised:
        return []  # looked at before
    tasks = prepared.plan.tasks
    fresh = set(chain.from_iterable(s.tasks for s in todo))
    rest = [t for i, t in enumerate(tasks) if t.inputs and (t.op != "copy" or i not in fresh)]
    return sorted(
        scan.suspects(prepared.sources, rest, workers=prepared.jobs, tell=tell, stop=stop)
    )
