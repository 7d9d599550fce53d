"""The one pipeline of every command that writes: look, decide, plan and check (`prepare`), then
make, measure and finish (`write`).

Nothing here prints. `Caller` is how a caller sees progress, and how it ends the work early with
everything finished kept.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

from moetool import making, steps
from moetool.data import JsonObject
from moetool.errors import VerificationFailed
from moetool.evaluate import current, measured
from moetool.evaluate.measured import Measured
from moetool.lock import Lock
from moetool.making import Shards
from moetool.methods.contract import Method, Report, Settings, Summary
from moetool.methods.options import Common
from moetool.methods.prepared import Options, Prepared
from moetool.progress import Clock, Progress, silent, unheard
from moetool.report import card, provenance
from moetool.surgery import companions, complete, ops, promise, scan, source
from moetool.surgery.checkpoint import Checkpoint, read_json
from moetool.surgery.device import check_device, check_engine
from moetool.surgery.place import check_target, check_work, existing, resolved
from moetool.surgery.writer import Writer


@dataclass(frozen=True)
class Caller:
    """Who hears how far the work is, and can stop it."""

    tell: Progress = silent
    stop: threading.Event = field(default_factory=threading.Event)
    say: Callable[[str], None] = unheard  # what must be known before long work


# --- before the first byte


def prepare(options: Options, caller: Caller | None = None) -> Prepared:
    """Look, decide, plan and check. Raises for everything that can be known before the work.
    Nothing is written, but for methods that send text through the model: they leave what they have
    done in a work folder beside OUT, so that the same command goes on from there.
    """
    from moetool import methods

    caller = caller or Caller()
    clock = Clock(caller.tell)
    caller = replace(caller, tell=clock)
    method = methods.make(options.method, options.values)
    steps.check(options)
    sources = tuple(Checkpoint.open(source.locate(name)) for name in options.sources)
    options = steps.served(options, method, sources)
    long = is_long(options)
    uncounted = complete.check(sources)
    check_device(options.common.device)
    check_engine(options.common.engine)
    overwrite = options.common.overwrite or _ours(options.out)
    check_target(resolved(options.out), [s.folder for s in sources], overwrite=overwrite)
    settings = _settings(options, caller)
    check_work(Path(settings.work))
    measuring = _measuring(sources[0], method, options.common)
    if options.common.strict and long:
        scan.check_finite(
            sources, scan.everything(sources), caller.tell, caller.stop
        )  # before text is sent
    held = None
    if long and not options.common.dry_run:
        held = Lock.take(Path(settings.work), f"this output ({options.out})")
    try:
        prepared = steps.decided(options, method, sources, settings)
        made = replace(prepared.made, warnings=(*uncounted, *prepared.made.warnings))
        peak = max(prepared.peak, measuring)
        prepared = replace(prepared, made=made, lock=held, peak=peak, stages=clock.taken())
        return _checked(prepared)
    except BaseException:
        if held is not None:
            held.release()
        raise


def is_long(options: Options) -> bool:
    """Whether deciding may take long, and keeps what it has done in the work folder."""
    from moetool import methods

    return bool(options.before) or methods.load(options.method).interruptible


def _settings(options: Options, caller: Caller) -> Settings:
    said = options.common
    return Settings(
        seed=said.seed,
        max_shard=said.max_shard_size,
        device=said.device,
        memory=said.memory,
        work=_work(options),
        dry_run=said.dry_run,
        tell=caller.tell,
        say=caller.say,
        stop=caller.stop,
    )


def _checked(prepared: Prepared) -> Prepared:
    """Everything about a plan that can be refused before it runs: operations, memory, disk."""
    options, plan, sources = prepared.options, prepared.plan, prepared.sources
    dtype_of = lambda piece: sources[piece.source].part(piece.name).dtype  # noqa: E731
    ops.rehearse(plan.tasks, dtype_of, plan.tables)
    fitted = promise.fit(plan, sources, options.common.jobs, options.common.memory)
    said = options.common
    how = {"overwrite": said.overwrite, "cloned": said.clone}
    writer = Writer(options.out, plan, sources=sources, **how)
    done = writer.finished()
    if done:
        current.check(prepared, writer.out)
    else:
        writer.check()
    fits = replace(prepared, jobs=fitted.jobs, done=done)
    return replace(fits, peak=max(fitted.peak, prepared.peak, measured.promise(fits)))


def _measuring(source: Checkpoint, method: Method, common: Common) -> int:
    """Promised bytes of the gates, whose text is read here for the first time."""
    if method.gate is None:
        return 0
    from moetool.evaluate import gate

    return gate.promise(source, method, common)


def _ours(out: str) -> bool:
    """A finished output of ours may be this very plan's: that is for the writer to say, once there
    is a plan.
    """
    return os.path.isfile(os.path.join(out, "moetool.json"))


def _work(options: Options) -> str:
    """The work folder: beside OUT; for a dry run one that goes with the process."""
    if options.common.dry_run:
        import atexit
        import tempfile

        folder = tempfile.mkdtemp(prefix="moetool-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder
    out = Path(os.path.abspath(options.out))
    return str(out.with_name(f".{out.name}.moetool-work"))


def summary(prepared: Prepared) -> Summary:
    """What `--dry-run` and the report say."""
    options, made, plan = prepared.options, prepared.made, prepared.plan
    return Summary(
        sources=prepared.names,
        out=os.path.abspath(options.out),
        method=options.method,
        options=prepared.method.recorded(),
        seed=options.common.seed,
        certificate=made.certificate,
        output_bytes=plan.disk,
        tensors=len(plan.targets),
        shards=len(plan.shards),
        read_bytes=_read_bytes(prepared),
        peak_memory=prepared.peak,
        jobs=prepared.jobs,
        free_disk=shutil.disk_usage(existing(Path(os.path.abspath(options.out)).parent)).free,
        plan_digest=plan.digest,
        dropped_tensors=plan.dropped,
        dropped_fields=made.dropped_fields,
        facts=made.facts,
        steps=tuple(map(summary, prepared.before)),
        clients=prepared.clients,
    )


def planned(prepared: Prepared) -> JsonObject:
    """What `--dry-run` gives a program: the summary, and what the report would warn of."""
    return summary(prepared).as_json() | {"warnings": list(prepared.made.warnings)}


def _read_bytes(prepared: Prepared) -> int:
    pieces = chain.from_iterable(task.inputs for task in prepared.plan.tasks)
    return sum(prepared.sources[piece.source].range_of(piece)[2] for piece in pieces)


# --- the work


def write(prepared: Prepared, caller: Caller | None = None) -> Report:
    """Make, measure, finish: the output, and its report. Stopped and failed runs keep their
    finished shards; call again to go on. A missed gate removes them and raises VerificationFailed.
    """
    try:
        return _written(prepared, caller or Caller())
    finally:
        if prepared.lock is not None:
            prepared.lock.release()


def _written(prepared: Prepared, caller: Caller) -> Report:
    if prepared.done:
        shutil.rmtree(prepared.work, ignore_errors=True)
        return _already(prepared)
    begun, clock = time.perf_counter(), Clock(caller.tell)
    caller = replace(caller, tell=clock)
    if prepared.options.common.strict:
        tasks, workers = prepared.plan.tasks, prepared.jobs
        scan.check_finite(prepared.sources, tasks, caller.tell, caller.stop, workers=workers)
    out, said, sources = prepared.options.out, prepared.options.common, prepared.sources
    how = {"overwrite": said.overwrite, "sync": said.sync}
    with Writer(out, prepared.plan, sources=sources, **how) as writer:
        written = make(prepared, writer, caller)
        made_in, _ = time.perf_counter() - begun, clock.taken()
        found = measure(prepared, writer, caller)
        times = Times(made_in, time.perf_counter() - begun, clock.taken())
        report = _report(prepared, written, times, found)
        finish(prepared, writer, report)
    shutil.rmtree(prepared.work, ignore_errors=True)
    return report


@dataclass(frozen=True)
class Times:
    """Seconds of making alone, and of everything since the work began; those of what was measured,
    by stage.
    """

    made: float
    all: float
    measured: dict[str, float]


def make(prepared: Prepared, writer: Writer, caller: Caller) -> Shards:
    """Every shard that is not there yet."""
    return making.make(prepared, writer, caller.tell, caller.stop)


def measure(prepared: Prepared, writer: Writer, caller: Caller) -> Measured:
    """Hold what was written against its source, before anything can load it; a missed check
    removes it and raises VerificationFailed.
    """
    try:
        opened = partial(staged, prepared, writer)
        return measured.of(prepared, opened, tell=caller.tell, stop=caller.stop)
    except VerificationFailed as missed:
        shutil.rmtree(writer.staging, ignore_errors=True)
        missed.hint += measured.kept_for_others(Path(prepared.work))
        raise


def finish(prepared: Prepared, writer: Writer, report: Report) -> None:
    """The small files, `config.json` and the final rename."""
    written = staged(prepared, writer) if _beyond(prepared) else None
    earlier = zip(prepared.before, report.steps, strict=True)
    files = {
        **dict(chain.from_iterable(p.method.files(Report.of(s)).items() for p, s in earlier)),
        "moetool.json": provenance.record(prepared, report, written),
        "README.md": card.render(prepared, report),
        **prepared.made.files,
        **prepared.method.files(report),
    }
    base = prepared.sources[0]
    travelling = {n: os.path.join(base.folder, n) for n in base.travelling() if n not in files}
    writer.finish(files, travelling, prepared.made.config)


def _beyond(prepared: Prepared) -> bool:
    """Whether something was read that does not travel with the output."""
    more = len(prepared.sources) > prepared.named
    return more or any(s.beyond for s in prepared.sources)


def staged(prepared: Prepared, writer: Writer) -> Checkpoint:
    """The finished shards, before there is a folder that loads."""
    names = [s.name for s in prepared.plan.shards]
    return Checkpoint.staged(str(writer.staging), names, prepared.made.config)


def _report(prepared: Prepared, written: Shards, times: Times, found: Measured) -> Report:
    """Where deciding takes long, its seconds count, and each stage has its own."""
    told = (*prepared.made.warnings, *written.findings, *found.warnings)
    left = companions.left_behind(prepared.sources[0].folder)
    report = Report.of(
        summary(prepared),
        warnings=(*told, *filter(None, [left])),
        resumed_shards=written.resumed,
        seconds=round(times.made, 3),
        ray_nodes=written.nodes,
        quality=found.quality,
        proof=found.proof,
    )
    if written.findings:
        report = replace(report, certificate=report.certificate.unsound)
    if not is_long(prepared.options):
        return report
    return replace(
        report,
        seconds=round(prepared.decided_in + times.all, 3),
        stages={
            **prepared.stages,
            "decide": prepared.decided_in,
            "write": round(times.made, 3),
            **times.measured,
            "measure": round(times.all - times.made, 3),
        },
        peak_rss=promise.peak_rss(),
    )


def _already(prepared: Prepared) -> Report:
    said = "the output was already there, whole, from this very plan: nothing was written"
    shards = len(prepared.plan.shards)
    report = Report.of(summary(prepared), warnings=(said,), resumed_shards=shards)
    record = read_json(Path(prepared.options.out, "moetool.json"), what="record of moetool")
    recorded, unsound = record["report"]["certificate"], report.certificate.unsound
    return replace(report, certificate=unsound) if recorded["why"] == unsound.why else report
