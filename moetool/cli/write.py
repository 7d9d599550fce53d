"""The commands that write: one for every method, each with the options that the method has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moetool import methods
from moetool.cli.app import session
from moetool.cli.options import Argument, Command, Given
from moetool.data import JsonObject
from moetool.methods.field import WHAT, Field, Value
from moetool.methods.options import Common, build, fields
from moetool.units import show_bytes, show_seconds

if TYPE_CHECKING:
    from moetool.methods.contract import Line, Method, Report, Summary
    from moetool.methods.prepared import Options, Prepared

PANEL = "Make a model"
ARGUMENTS = (
    Argument("src", "a folder, a .safetensors file, or a Hub id org/name[@revision]", "SRC"),
    Argument("out", "folder to write; must not exist, or be empty", "OUT"),
)
COMMON = fields(Common)
STAGES = ("decide", "write", "measure")  # of a report; others are parts of the next of them


def command(name: str) -> Command:
    """The command of a method."""
    cls = methods.load(name)
    further = [_from(cls.several)] if cls.several else []
    return Command(
        name,
        f"{methods.METHODS[name].about}\n\n{_more(cls)}",
        lambda given: _run(name, given),
        ARGUMENTS,
        (*cls.fields(), *further, *COMMON),
        cls.examples,
        PANEL,
    )


def _from(text: str) -> Field:
    return Field("from_", tuple, (), text, WHAT, unit="whole", metavar="MODEL")


def _more(cls: type[Method]) -> str:
    """What the class says beyond its first sentence."""
    return "\n".join(line.strip() for line in (cls.__doc__ or "").partition("\n\n")[2].splitlines())


def _run(name: str, given: Given) -> int:
    further = given.values.pop("from_", ())
    assert isinstance(further, tuple)
    sources = (given.arguments["src"], *further)
    common = {f.name for f in COMMON}
    own = {k: v for k, v in given.values.items() if k not in common}
    shared = {k: v for k, v in given.values.items() if k in common}
    return write(options_of(name, sources, given.arguments["out"], own, shared))


def options_of(
    name: str,
    sources: tuple[str, ...],
    out: str,
    own: Mapping[str, Value],
    common: Mapping[str, Value],
) -> Options:
    """One command, as the pipeline takes it."""
    from moetool.methods.prepared import Options

    made = build(Common, common, name)
    return Options(out, sources, name, dict(own), made, session.command)


def write(options: Options) -> int:
    """Prepare; show, or make; report."""
    from moetool import pipeline

    sink, caller = (
        session.sink,
        pipeline.Caller(session.sink.progress, session.stop, session.sink.say),
    )
    session.working = pipeline.is_long(options)
    prepared = pipeline.prepare(options, caller)
    if options.common.dry_run:
        return _dry_run(prepared)
    session.working = True
    report = pipeline.write(prepared, caller)
    session.working, session.finished = False, True
    for warning in report.warnings:
        sink.say(f"warning: {warning}")
    sink.result(report.as_json(), shown(prepared.method, report, report))
    return 0


def _dry_run(prepared: Prepared) -> int:
    from moetool import pipeline

    summary = pipeline.summary(prepared)
    for warning in prepared.made.warnings:
        session.sink.say(f"warning: {warning}")
    text = shown(prepared.method, summary, None) + "\nnothing was written (--dry-run)"
    session.sink.result(pipeline.planned(prepared) | {"dry_run": True}, text)
    return 0


def shown(method: Method, summary: Summary, report: Report | None) -> str:
    """A plan, or a finished run, for people."""
    from moetool.methods import works
    from moetool.methods.contract import Line

    certificate = summary.certificate
    files = f"{summary.shards} file{'s' * (summary.shards != 1)}, {summary.tensors} tensors"
    size = f"{show_bytes(summary.output_bytes)} in {files} ({show_bytes(summary.free_disk)} free)"
    workers = f"{summary.jobs} worker{'s' * (summary.jobs != 1)}"
    coverage = f", coverage {certificate.coverage:g}" if certificate.coverage is not None else ""
    lines = [
        *_before(summary),
        *method.lines(summary),
        Line("output", size),
        Line("memory", f"at most {show_bytes(summary.peak_memory)}, {workers}"),
        Line("certificate", f"{certificate.level}{coverage}: {certificate.why}"),
        *works.lines(summary.clients),
        *method.notes(summary),
        *(_done(report) if report else ()),
    ]
    return "\n".join([f"{' + '.join(summary.sources)} -> {summary.out}", *map(str, lines)])


def _before(summary: Summary) -> list[Line]:
    """What the earlier steps of a recipe do; nobody writes what lies between."""
    from moetool.methods.contract import Line

    found = []
    for number, step in enumerate(summary.steps, 1):
        size = f"{step.method} to {show_bytes(step.output_bytes)}, which is read and not written"
        lines = methods.make(step.method, step.options).lines(step)
        found += [Line(f"step {number}", size), *lines]
    last = Line(f"step {len(summary.steps) + 1}", summary.method)
    return [*found, last] if found else []


def _done(report: Report) -> list[Line]:
    from moetool.methods.contract import Line

    found = []
    if report.quality:
        found.append(Line("quality", _quality(report.quality)))
    rate = report.output_bytes / max(report.seconds, 1e-9)
    pace = "" if report.stages or not report.seconds else f", {show_bytes(rate)}/s"
    there = f", {report.resumed_shards} files were there already" if report.resumed_shards else ""
    took = show_seconds(report.seconds) + _stages(report.stages or {})
    return [*found, Line("done", f"{took}{pace}{there}")]


def _stages(seconds: Mapping[str, float]) -> str:
    """`: decide 2m 5s (profile 48.0s, refit 1m 16s), write 3.0s`; what took no time is left out."""
    said, parts = [], list[str]()
    for name, took in seconds.items():
        shown = [f"{name} {show_seconds(took)}"] if took >= 0.05 else []
        if name not in STAGES:
            parts += shown
            continue
        inside = f" ({', '.join(parts)})" if parts else ""
        said += [one + inside for one in shown]
        parts = []
    return f": {', '.join(said)}" if said else ""


def _quality(found: JsonObject) -> str:
    """What was measured of an output, and on what; ids that nobody wrote have no perplexity."""
    kl, on = f"KL {found['kl']:.4g}", f"on {found['tokens']:,} predictions"
    if "drawn" in found:
        return f"{kl} {on} of {found['drawn']}"
    change = f"{found['reference_perplexity']:.4g} -> {found['perplexity']:.4g}"
    return (
        f"{kl}, perplexity {change} {on}{'' if found['held_out'] else ' of the calibration text'}"
    )
