"""Look, decide and plan: one verb, or several in a row. Each step reads what the one before would
write (surgery/view.py); only what had to be computed for that is made, in the work folder.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from moetool import methods
from moetool.errors import MoetoolError, UsageError
from moetool.methods import works
from moetool.methods.certificates import weakest
from moetool.methods.contract import Method, Settings
from moetool.methods.convert import lie
from moetool.methods.prepared import Options, Prepared, Step
from moetool.progress import Progress, Stage
from moetool.surgery import groups, view
from moetool.surgery.checkpoint import Checkpoint


def decided(
    options: Options, method: Method, sources: tuple[Checkpoint, ...], settings: Settings
) -> Prepared:
    """Decide and plan, step after step; the promise so far is that of deciding."""
    before: tuple[Prepared, ...] = ()
    count, peak, further = len(options.before) + 1, 0, sources[1:]
    for number, step in enumerate(options.before, 1):
        one = _asked(options, step)
        mine = replace(
            settings,
            work=str(Path(settings.work, "steps", str(number))),
            tell=_named(settings.tell, f"{number}/{count} {step.method}"),
        )
        read = _read(sources, before, further if step.further else ())
        made = _one(one, methods.make(step.method, step.values), read, mine)
        made = replace(made, before=before)
        shown = _shown(made, mine)
        before, sources, peak = (*before, made), (shown.files,), max(peak, made.peak, shown.peak)
    if before:
        named = _named(settings.tell, f"{count}/{count} {options.method}")
        settings = replace(settings, tell=named)
    read = _read(sources, before, further if options.further else ())
    last = _one(options, method, read, settings)
    judged = works.of(last.made, sources[0].folder)
    certificate = weakest([p.made.certificate for p in (*before, last)])
    told = works.warnings(judged, works.traits(last.made, sources[0].folder))
    warnings = [*chain.from_iterable(p.made.warnings for p in (*before, last)), *told]
    return replace(
        last,
        made=replace(last.made, certificate=certificate, warnings=tuple(dict.fromkeys(warnings))),
        clients=judged,
        before=before,
        peak=max(peak, last.peak),
        decided_in=round(sum(p.decided_in for p in (*before, last)), 3),
    )


def served(options: Options, method: Method, sources: Sequence[Checkpoint]) -> Options:
    """The same, with a first step that writes experts as the clients of --for read them, where the
    source's lie otherwise and no step says how they are to lie.
    """
    if any(methods.load(step.method).lays for step in options.before):
        return options
    step = lie.first(method, sources[0])
    return replace(options, before=(step, *options.before)) if step else options


def check(options: Options) -> None:
    """Refuse steps that do not go together; UsageError."""
    for number, step in enumerate(options.before, 1):
        if methods.make(step.method, step.values).gate is not None:
            raise UsageError(
                f"step {number} ({step.method}) has a gate, or text for one",
                expected="a gate in the last step: it holds the output against SRC",
                hint=f"leave out max-kl, max-perplexity-increase and text of step {number}",
            )


def _read(
    sources: tuple[Checkpoint, ...], before: Sequence[Prepared], further: Sequence[Checkpoint]
) -> tuple[Checkpoint, ...]:
    """What a step reads: the first one all sources, a later one what the one before it makes."""
    return (*sources, *further) if before else sources


def _asked(options: Options, step: Step) -> Options:
    return replace(options, method=step.method, values=step.values, before=(), further=step.further)


def _one(
    options: Options, method: Method, sources: tuple[Checkpoint, ...], settings: Settings
) -> Prepared:
    _accept(method, sources)
    if method.interruptible:
        works.check_model(method, sources[0])
    begun = time.perf_counter()
    decisions = method.decide(sources, settings)
    took = round(time.perf_counter() - begun, 3)
    made = method.plan(sources, decisions, settings)
    untried = works.check(method, made, sources[0])
    made = replace(made, warnings=(*made.warnings, *untried))
    return Prepared(
        options,
        method,
        (*sources, *decisions.extra),
        made,
        decisions.chosen,
        0,
        decisions.memory,
        work=settings.work,
        decided_in=took,
    )


def _accept(method: Method, sources: tuple[Checkpoint, ...]) -> None:
    """Refuse sources with experts that no stock class holds, and language models inside classes of
    the Hub, where a verb does not know them.
    """
    inside = next((s for s in sources if s.hub_left), None)
    if inside is not None and not method.takes_out:
        raise MoetoolError(
            f"this model is a {inside.hub_class} inside a class of the Hub, with more beside it",
            file=inside.folder,
            expected="a language model by itself",
            found=f"{len(inside.hub_left)} other tensors, first {inside.hub_left[0]}",
            hint="`moetool convert-layout SRC OUT --to stock` takes the language model out",
        )
    held = next((s for s in sources if groups.is_ours(s.config) and groups.read(s.config)), None)
    if held is not None and not method.reads_groups:
        raise MoetoolError(
            "this model has groups of experts that no stock class holds",
            file=held.folder,
            expected="a model of a stock class",
            found=f"model type {groups.MODEL_TYPE}",
            hint="`moetool materialize` writes a native model of it, where that is exact",
        )


def _shown(prepared: Prepared, settings: Settings) -> view.Between:
    """What a step would write; what had to be computed for it lies in the work folder."""
    plan, sources, common = prepared.plan, prepared.sources, prepared.options.common
    if plan.container:
        raise UsageError(
            "only the last step can write another kind of file",
            found=str(plan.container.get("name")),
            hint=f"put {prepared.options.method} last",
        )
    parts, rest, peak = view.parted(plan), None, 0
    if parts.rest is not None:
        how = view.Means(
            Path(settings.work),
            common.jobs,
            common.memory,
            common.device,
            common.sync,
            settings.tell,
            settings.stop,
        )
        made = view.make(parts.rest, sources, how)
        rest, peak = made.files, made.peak
    gone = view.beyond(plan.tasks, sources, prepared.named)
    return view.Between(view.of(plan, sources, parts.runs, rest, gone), peak)


def _named(tell: Progress, step: str) -> Progress:
    """Progress that says which step it is of."""

    def told(stage: Stage, done: int, total: int) -> None:
        tell(replace(stage, name=f"{step}: {stage.name}"), done, total)

    return told
