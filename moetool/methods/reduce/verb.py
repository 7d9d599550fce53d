"""What prune and merge are as verbs: options of their own and of their ways, one decision, one
plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

from moetool.methods.contract import Decisions, Line, Made, Report, Settings, Summary
from moetool.methods.options import Gate
from moetool.methods.reduce import replay
from moetool.methods.reduce.options import Reducing, renamed, without_text
from moetool.methods.reduce.way import Way, meant_by_auto
from moetool.methods.several import Several
from moetool.surgery.checkpoint import Checkpoint

if TYPE_CHECKING:
    from moetool.methods.reduce.facts import Reduced
    from moetool.surgery.experts import Mixture


class Reduce(Several):
    """A verb that gives a model fewer experts. `way` runs; `options` are as they were told."""

    Options: ClassVar[type[Reducing]]
    Base: ClassVar[type[Way]]
    interruptible = True

    def __init__(self, options: Reducing, way: Way, remarks: tuple[str, ...] = ()) -> None:
        super().__init__(options)
        self.way, self.remarks = way, remarks
        self.bare: Mapping[str, object] | None = (
            None  # by a user who gave no text and left the choice to us
        )

    @classmethod
    def ways(cls) -> Mapping[str, type[Way]]:
        return cls.Base.known()

    @classmethod
    def make(cls, values: Mapping[str, object]) -> Reduce:
        given = renamed(values, cls.fields())
        planned = replay.planned(given.values, cls.ways())
        told = {**planned.usual, **given.values}
        values = without_text(told, planned.on, moved=planned.moved)
        made = cls._of(values, given.notes)
        made.bare = told if values is not told else None
        return made

    @classmethod
    def _of(cls, values: Mapping[str, object], notes: tuple[str, ...]) -> Reduce:
        told = cls.split(values)
        way = told.acting(told.options, told.own, cls.named(told.options))
        way.told()
        return cls(told.options, way, notes)

    @classmethod
    def named(cls, options: Reducing) -> type[Way]:
        if options.method == "auto":
            return meant_by_auto(cls.ways(), text=options.has_text)
        return cls.ways()[options.method]

    @classmethod
    def acting(cls, options: Reducing) -> type[Way]:
        return cls.named(options).acting(options)

    @property
    def gate(self) -> Gate | None:
        options: Reducing = self.options
        return options if options.gated or options.text else None

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        from moetool.methods.reduce import uneven
        from moetool.methods.reduce.asked import Asked
        from moetool.methods.reduce.decide import decide, mixture_of

        (source,) = sources
        mixture = mixture_of(source)
        if self.bare is not None:
            self._settle(mixture, settings.memory)
        self.way.check(mixture)
        uneven.check(mixture, self.way.options)
        notes = (*self.remarks, *self.way.notes(mixture))
        asked = Asked(self.verb, self.way, mixture, settings, notes)
        return decide(asked)

    def _settle(self, mixture: Mixture, memory: int | None) -> None:
        """Where the user gave no text, the model writes its own; random ids stand for it where it
        does not fit into memory whole, and nothing runs where experts cannot be computed with.
        """
        from moetool.forward import drawn, own

        told, remarks = self.bare or {}, self.remarks
        if not mixture.plain:
            chosen = type(self)._of(told, remarks)
        elif not own.fits(mixture.source, memory):
            chosen = type(self)._of(without_text(told, drawn.RANDOM), remarks)
            remarks = (*remarks, own.too_large(mixture.source, memory))
        else:
            return
        self.options, self.way, self.remarks = chosen.options, chosen.way, remarks

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        from moetool.methods.reduce import facts
        from moetool.methods.reduce.decide import Chosen
        from moetool.methods.reduce.decided import ORDERS, Decided, experts_lists
        from moetool.methods.reduce.writing import Writing
        from moetool.surgery import reform, shim
        from moetool.surgery.experts import Mixture

        mixture, tables = Mixture.of(sources[0]), decisions.tables
        decided = Decided.from_json(decisions.chosen).with_orders(tables)
        decided.check(mixture, "decisions")
        writing = Writing(mixture, decided, tables, decisions.extra, settings)
        written = self.way.writer(decided).write(writing)
        found = decisions.found if isinstance(decisions, Chosen) else facts.Found()
        reduced = facts.of(writing, written, found, self.way.facts(mixture))
        beside = shim.beside(written.plan.config)
        files = {**decided.files(), **experts_lists(decided), **beside}
        return Made(
            written.plan,
            written.certificate,
            written.plan.config,
            {},
            reduced,
            (*found.warnings, *reform.widened(sources[:1], written.plan, self.options.form)),
            files,
            dict.fromkeys(decided.tables(), ORDERS),
        )

    def lines(self, summary: Summary) -> list[Line]:
        from moetool.methods.reduce import lines

        reduced = _reduced(summary)
        return lines.lines(reduced, type(self.way).lines(reduced.own))

    def notes(self, summary: Summary) -> list[Line]:
        from moetool.methods.reduce import lines

        return lines.notes(_reduced(summary))

    def card(self, report: Report) -> list[str]:
        from moetool.methods.reduce.lines import calibrated, counted, refitted

        reduced = _reduced(report)
        share = f"({100 * reduced.removed_share:.0f} % removed)"
        how = f"{reduced.decided.method}; report.json says which, decisions.json replays it"
        said = [f"{line.label or 'refit'}: {line.sentence}" for line in refitted(reduced.found)]
        return [f"{counted(reduced)} {share} by {how}", *said, *calibrated(reduced.found)]

    def files(self, report: Report) -> dict[str, bytes]:
        from moetool.methods.reduce import report as document

        return {"report.json": document.render(report, _reduced(report))}


def _reduced(summary: Summary) -> Reduced:
    """The facts of prune and merge."""
    return cast("Reduced", summary.facts)
