"""The one pipeline of every command that writes: look -> decide -> plan -> check -> make -> finish.

Nothing here prints. `Run.prepare` reads headers (and what the method asks for), `Run.make` writes;
a caller passes `tell` to see progress and sets `stop` to end early with everything finished kept.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moetool.errors import MoetoolError, Stopped, UsageError, VerificationFailed
from moetool.methods.contract import Made, Method, Settings
from moetool.progress import Progress, silent
from moetool.report import card, compression, provenance
from moetool.surgery import companions, engine, ops, scan, source
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.place import check_target, existing, resolved
from moetool.surgery.plan import Plan, Shard
from moetool.surgery.writer import Writer


@dataclass(frozen=True)
class Options:
    """What every writing command understands."""

    out: str
    sources: tuple[str, ...]
    method: str
    method_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    jobs: int = 0  # 0: as many as cores and --memory allow
    memory: int | None = None
    max_shard: int = 5_000_000_000
    overwrite: bool = False
    strict: bool = False
    device: str = "cpu"
    engine: str = "local"
    ray_address: str | None = None
    command: str = ""
    dry_run: bool = False


@dataclass(frozen=True)
class Prepared:
    """A plan with everything known of it before the first byte is written."""

    options: Options
    method: Method
    sources: tuple[Checkpoint, ...]
    names: tuple[str, ...]
    made: Made
    jobs: int
    peak: int
    done: bool = False  # the output is already there, whole, from this very plan
    work: str = ""
    decided_in: float = 0.0  # seconds

    @property
    def plan(self) -> Plan:
        return self.made.plan

    def summary(self) -> dict[str, Any]:
        """What `--dry-run` and the report say."""
        return {
            "sources": list(self.names),
            "out": os.path.abspath(self.options.out),
            "method": self.options.method,
            "options": _recorded(self.method),
            "seed": self.options.seed,
            "certificate": asdict(self.made.certificate),
            "output_bytes": self.plan.disk,
            "tensors": len(self.plan.targets),
            "shards": len(self.plan.shards),
            "read_bytes": _read_bytes(self),
            "peak_memory": self.peak,
            "jobs": self.jobs,
            "free_disk": _free(self.options.out),
            "plan_digest": self.plan.digest,
            "dropped_tensors": self.plan.dropped,
            "dropped_fields": self.made.dropped_fields,
            **(self.made.facts if isinstance(self.made.facts, dict) else self.made.facts.as_json()),
        }


def prepare(
    options: Options, *, progress: Progress | None = None, stop: threading.Event | None = None
) -> Prepared:
    """Look, decide, plan and check. Raises for everything that can be known before the work.
    Nothing is written, but for methods that send text through the model: they leave what they have
    done in a work folder beside OUT, so that the same command goes on from there.
    """
    from moetool import methods

    method = methods.make(options.method, options.method_options)
    names = options.sources
    sources = tuple(Checkpoint.open(source.locate(name)) for name in names)
    check_target(
        resolved(options.out),
        [s.folder for s in sources],
        overwrite=options.overwrite or _ours(options.out),
    )
    work = _work(options)
    settings = Settings(
        options.seed,
        options.max_shard,
        options.device,
        options.memory,
        work,
        options.dry_run,
        progress or silent,
        stop,
    )
    begun = time.perf_counter()
    decisions = method.decide(sources, settings)
    took = time.perf_counter() - begun
    made = method.plan(sources, decisions, settings)
    sources += decisions.extra
    dtype_of = lambda piece: sources[piece.source].part(piece.name).dtype  # noqa: E731
    ops.rehearse(made.plan.tasks, dtype_of, made.plan.tables)
    jobs, peak = fit_memory(made.plan, sources, options)
    peak = max(peak, decisions.memory)
    writer = Writer(options.out, made.plan, overwrite=options.overwrite, sources=sources)
    done = writer.finished()
    if not done:
        writer.check()
    return Prepared(options, method, sources, names, made, jobs, peak, done, work, round(took, 3))


def _recorded(method: Any) -> dict[str, Any]:
    return method.recorded() if isinstance(method, Method) else asdict(method)


def _ours(out: str) -> bool:
    """A finished output of ours may be this very plan's: that is for the writer to say, once there
    is a plan.
    """
    return os.path.isfile(os.path.join(out, "moetool.json"))


def _work(options: Options) -> str:
    """The work folder: beside OUT; for a dry run one that goes with the process."""
    if options.dry_run:
        import atexit
        import tempfile

        folder = tempfile.mkdtemp(prefix="moetool-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder
    out = Path(os.path.abspath(options.out))
    return str(out.with_name(f".{out.name}.moetool-work"))


def fit_memory(plan: Plan, sources: Sequence[Checkpoint], options: Options) -> tuple[int, int]:
    """(workers, promised peak bytes): the most workers that keep the promise; MoetoolError when
    one is too many.
    """
    kind = ops.needs(plan.tasks)
    base = (
        ops.RESERVE + ops.NUMPY_RESERVE + (ops.TORCH_RESERVE if kind == "torch" else 0)
    )  # numpy looks for NaN in every run
    dtypes = {n: t.dtype for n, t in plan.targets.items()}
    costs = sorted(
        (
            ops.task_memory(t, dtypes, lambda p: sources[p.source].range_of(p)[2])
            for t in plan.tasks
        ),
        reverse=True,
    ) or [0]
    base += 600 * sum(len(s.tensors) for s in sources) + 2500 * len(
        plan.tasks
    )  # headers and the plan itself, measured
    wanted = options.jobs or (os.cpu_count() or 1)
    for jobs in range(wanted, 0, -1):
        peak = base + sum(costs[:jobs])
        if options.memory is None or peak <= options.memory:
            return jobs, peak
    raise MoetoolError(
        "the work does not fit into --memory",
        expected=f"at least {peak:,} bytes",
        found=f"{options.memory:,} bytes",
        hint=f"the widest task needs {costs[0]:,} bytes; raise --memory",
    )


def make(
    prepared: Prepared, *, progress: Progress | None = None, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Write the output and return its report. Stopped and failed runs keep their finished shards;
    call again to go on.
    """
    options, plan = prepared.options, prepared.plan
    stop = stop or threading.Event()
    progress = progress or (lambda stage, done, total: None)
    begun = time.perf_counter()
    if prepared.done:
        shutil.rmtree(prepared.work, ignore_errors=True)
        return prepared.summary() | {
            "warnings": [
                "the output was already there, whole, from this very plan: nothing was written"
            ],
            "resumed_shards": len(plan.shards),
            "seconds": 0.0,
        }
    suspects = _strictly_finite(prepared, progress, stop) if options.strict else []
    writer = Writer(options.out, plan, overwrite=options.overwrite, sources=prepared.sources)
    with writer:
        todo = [s for s in plan.shards if not writer.is_done(s)]
        suspects += _look(prepared, todo, progress, stop)
        total = sum(s.size for s in plan.shards)
        state = _Counter(progress, total, total - sum(s.size for s in todo))
        jobs = list(
            engine.jobs_of(
                plan,
                prepared.sources,
                todo,
                str(writer.staging),
                device=options.device,
                threads=prepared.jobs,
                watch=not options.strict,
            )
        )

        def done(job: engine.Job, found: list[scan.Suspect]) -> None:
            writer.publish(job.path)
            suspects.extend(found)

        nodes = _run(options, prepared.jobs, jobs, done, state, stop)
        findings = (
            [
                f"{b.file}: {b.name} holds {b.what}"
                for b in scan.named(prepared.sources, plan.tasks, suspects)
            ]
            if suspects
            else []
        )
        report = prepared.summary() | {
            "warnings": [*prepared.made.warnings, *findings, *_left_behind(prepared)],
            "resumed_shards": len(plan.shards) - len(todo),
            "seconds": round(time.perf_counter() - begun, 3),
        }
        if nodes:
            report["ray_nodes"] = nodes
        written_in = time.perf_counter() - begun
        report |= _gate(prepared, writer, progress, stop)
        written = _staged(prepared, writer) if len(prepared.sources) > len(prepared.names) else None
        record = provenance.record(prepared, report, written)
        files = {
            "moetool.json": record,
            "README.md": card.render(prepared, report),
            **prepared.made.files,
        }
        if "reduction" in report:
            spent = time.perf_counter() - begun
            stages = {
                "decide": prepared.decided_in,
                "write": round(written_in, 3),
                "measure": round(spent - written_in, 3),
            }
            report |= {
                "seconds": round(prepared.decided_in + spent, 3),
                "stages": stages,
                "peak_rss": compression.peak_rss(),
            }
            files["report.json"] = compression.render(report)
        folder = prepared.sources[0].folder
        writer.finish(
            files,
            {
                n: os.path.join(folder, n)
                for n in prepared.sources[0].travelling()
                if n not in files
            },
            prepared.made.config,
        )
    shutil.rmtree(prepared.work, ignore_errors=True)
    return report


def _gate(
    prepared: Prepared, writer: Writer, progress: Progress, stop: threading.Event
) -> dict[str, Any]:
    """Measure what was written before anything can load it; a missed gate removes it and raises
    VerificationFailed.
    """
    method = prepared.method
    if not isinstance(method, Method) or method.gate is None:
        return {}
    from moetool.evaluate import gate

    try:
        return gate.measure(
            prepared.sources[0],
            _staged(prepared, writer),
            method.gate,
            prepared.options,
            tell=progress,
            stop=stop,
        )
    except VerificationFailed:
        shutil.rmtree(writer.staging, ignore_errors=True)
        raise


def _staged(prepared: Prepared, writer: Writer) -> Checkpoint:
    """The finished shards, before there is a folder that loads."""
    return Checkpoint.staged(
        str(writer.staging), [s.name for s in prepared.plan.shards], prepared.made.config
    )


class _Counter:
    """Adds up bytes from many threads."""

    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self._progress, self._total, self._done, self._lock = (
            progress,
            total,
            done,
            threading.Lock(),
        )

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress("write", min(self._done, self._total), self._total)


def _run(
    options: Options,
    workers: int,
    jobs: list[engine.Job],
    done: Callable[[engine.Job, list[scan.Suspect]], None],
    tell: engine.Tell,
    stop: threading.Event,
) -> list[str]:
    try:
        if options.engine == "ray":
            from moetool.surgery.engine_ray import run_ray

            return run_ray(jobs, done, address=options.ray_address, tell=tell, stop=stop)
        if options.engine != "local":
            raise UsageError(
                f"no engine {options.engine!r}", expected="local or ray", hint="leave out --engine"
            )
        engine.run_local(jobs, done, workers=workers, tell=tell, stop=stop)
    except Stopped:
        raise Stopped(
            "stopped; finished shards are kept",
            file=options.out,
            hint="run the same command again to go on",
        ) from None
    except OSError as problem:
        raise MoetoolError(
            f"writing failed: {problem.strerror or problem}",
            file=options.out,
            hint="finished shards are kept: mend the cause and run the same command again",
        ) from None
    return []


def _strictly_finite(
    prepared: Prepared, progress: Progress, stop: threading.Event
) -> list[scan.Suspect]:
    """With --strict everything that is read is looked at before a byte is written."""
    found = scan.suspects(
        prepared.sources, prepared.plan.tasks, workers=prepared.jobs, tell=progress, stop=stop
    )
    bad = scan.named(prepared.sources, prepared.plan.tasks, found) if found else []
    if bad:
        raise MoetoolError(
            "weights are not finite",
            file=bad[0].file,
            tensor=bad[0].name,
            found=f"{bad[0].what}, in {len(bad)} tensors",
            expected="finite values",
            hint="repair the checkpoint, or leave out --strict",
        )
    return []


def _look(
    prepared: Prepared, todo: Sequence[Shard], progress: Progress, stop: threading.Event
) -> list[scan.Suspect]:
    """NaN and inf in what the copies of this run will not see: inputs of computed tasks, and
    shards that were there already.
    """
    if prepared.options.strict:
        return []
    tasks, fresh = prepared.plan.tasks, {i for s in todo for i in s.tasks}
    rest = [t for i, t in enumerate(tasks) if t.inputs and (t.op != "copy" or i not in fresh)]
    return sorted(
        scan.suspects(prepared.sources, rest, workers=prepared.jobs, tell=progress, stop=stop)
    )


def _left_behind(prepared: Prepared) -> list[str]:
    line = companions.left_behind(prepared.sources[0].folder)
    return [line] if line else []


def _read_bytes(prepared: Prepared) -> int:
    return sum(
        prepared.sources[p.source].range_of(p)[2] for t in prepared.plan.tasks for p in t.inputs
    )


def _free(out: str) -> int:
    return shutil.disk_usage(existing(Path(os.path.abspath(out)).parent)).free
