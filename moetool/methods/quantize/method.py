"""moetool quantize: matrices in fewer bits, every expert or named as left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, cast

from moetool.data import JsonObject
from moetool.methods.contract import (
    Builder,
    Certificate,
    Decisions,
    Line,
    Made,
    Report,
    Settings,
    Summary,
)
from moetool.methods.field import WHAT
from moetool.methods.options import CHECKED, Gate, option
from moetool.methods.proof import Pledge
from moetool.methods.quantize.options import Quantizing
from moetool.methods.quantize.way import Rounding, ToRound
from moetool.methods.several import Several
from moetool.surgery import forms, reform, to_gguf
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.forms.gguf import PLAIN
from moetool.surgery.plan import Outputs
from moetool.surgery.spec import whole

if TYPE_CHECKING:
    from moetool.methods.quantize.choice import Choice
    from moetool.methods.quantize.facts import Quantized
    from moetool.methods.quantize.scheme import Scheme
    from moetool.surgery.plan import Plan
    from moetool.surgery.roles import Matrix


def _help() -> str:
    ways = "; ".join(f"{name}: {way.about().rstrip('.')}" for name, way in Rounding.known().items())
    return f"how weights are rounded. auto: gptq with text, else rtn. {ways}"


@dataclass(frozen=True)
class Asking(Quantizing):
    """What quantize is told."""

    method: str = option("auto", _help, WHAT, choices=lambda: ("auto", *Rounding.known()))


class Quantize(Several):
    """Store a model's matrices in fewer bits. Every expert is quantized or named as left out."""

    Options = Asking
    Base = Rounding
    verb: ClassVar[str] = "quantize"
    interruptible = True
    examples = (
        "moetool quantize demo small --format int4/32",
        "moetool quantize SRC OUT --format int4 --calibrate text.jsonl",
        'moetool quantize SRC OUT --plan "experts=int4/128,attn=int8/128"',
        "moetool quantize SRC OUT --target-size 6GB --calibrate text.jsonl",
    )
    options: Asking
    way: Rounding

    def __init__(self, options: Asking, way: Rounding) -> None:
        super().__init__(options)
        self.way = way

    @classmethod
    def ways(cls) -> Mapping[str, type[Rounding]]:
        return Rounding.known()

    @classmethod
    def named(cls, options: Asking) -> type[Rounding]:
        if options.method != "auto":
            return cls.ways()[options.method]
        return cls.ways()["gptq" if options.has_text and _may_solve(options) else "rtn"]

    @classmethod
    def make(cls, values: Mapping[str, object]) -> Quantize:
        told = cls.split(values)
        return cls(told.options, told.acting(told.options, told.own))

    @property
    def gate(self) -> Gate | None:
        return self.options if self.options.gated or self.options.text else None

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        from moetool.methods.quantize import fit, refuse, scheme

        source, told, fitted = sources[0], self.options, None
        if told.fits:
            fitted = fit.fit(fit.ToFit(source, told, settings, lambda s: self._size(source, s)))
            told = _with(told, fitted.plan)
        choice, way = scheme.choose(source, scheme.Scheme.of(told), told), self.way
        if not settings.dry_run:
            refuse.not_finite(source, choice, settings)
        found = way.decide(ToRound(source, choice, settings))
        if fitted is None:
            return found
        return replace(
            found,
            chosen={**found.chosen, "plan": fitted.plan},
            report={**found.report, "fit": fitted.report},
            memory=max(found.memory, fitted.memory),
        )

    def _size(self, source: Checkpoint, asked: Scheme) -> Plan:
        """The plan of a scheme, as far as its bytes go."""
        from moetool.methods.quantize import scheme

        choice = scheme.choose(source, asked, replace(self.options, force=True))
        return _laid((source,), asked, choice, self.way.rounding, 1 << 62).plan

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """Every tensor as it is, but for the matrices that get a form."""
        from moetool.methods.quantize import already, facts, refuse, scheme
        from moetool.methods.quantize import solved as solving

        source, chosen = sources[0], decisions.chosen.get("plan")
        told = _with(self.options, chosen) if chosen else self.options
        asked = scheme.Scheme.of(told)
        choice = scheme.choose(source, asked, told)
        read = (source, *(solving.again(one, choice) for one in decisions.extra))
        laid = _laid(read, asked, choice, self.way.rounding, settings.max_shard)
        loaders = asked.loaders(self.options)
        said = (self.way.name, loaders)
        found = facts.of(source, asked, choice, laid.plan, said)
        certificate = _certificate(source, choice, found.formats(), laid.warnings)
        solved: JsonObject = {**decisions.report}
        fitted = solved.pop("fit", {})
        warnings = (*choice.warnings, *laid.warnings, *solved.pop("warnings", ()))
        warnings += tuple(already.warnings(source, choice))
        return Made(
            laid.plan,
            certificate,
            laid.plan.config,
            {},
            replace(found, solved=solved, fit=fitted),
            warnings,
            promised=_promised(read, choice, laid.into),
            loader=_first_run(loaders) if self._asks_loader(choice) else "",
            scheme=tuple(refuse.written(source, choice)),
        )

    def _asks_loader(self, choice: Choice) -> bool:
        """Not for what --force writes against its advice."""
        return self.options.loader_check and not (self.options.force and choice.warnings)

    def lines(self, summary: Summary) -> list[Line]:
        return _quantized(summary).lines()

    def notes(self, summary: Summary) -> list[Line]:
        proof = summary.proof if isinstance(summary, Report) else None
        return [Line("read back", said) for said in proof.sentences()] if proof else []

    def card(self, report: Report) -> list[str]:
        facts = _quantized(report)
        each = ", ".join(f"{role} {r.format}" for role, r in facts.roles.items())
        said = [f"rounded by {facts.method}: {each}; report.json names what stayed full"]
        experts = [f"expert matrices {facts.counted()}"] if facts.experts_total else []
        return [*said, *experts, *(report.proof.sentences() if report.proof else ())]

    def files(self, report: Report) -> dict[str, bytes]:
        from moetool.methods.quantize import report as document

        return {"report.json": document.render(report)}


def _first_run(loaders: Sequence[str]) -> str:
    """Of those that must read it the one that can be asked here, else the first."""
    return next((name for name in loaders if name in CHECKED), loaders[0])


def _may_solve(options: Asking) -> bool:
    """Whether a format has a grid, or they are still to be chosen."""
    from moetool.methods.quantize import grids, scheme

    return options.fits or any(map(grids.has, scheme.Scheme.of(options).roles.values()))


def _certificate(
    source: Checkpoint, choice: Choice, said: str, warnings: Sequence[str]
) -> Certificate:
    """None, but where every weight is in the 16 bits that it was in."""
    kinds = {n: PLAIN.get(a.params.get("kind", "")) for n, a in choice.formats.items()}
    if source.told or any(kind != choice.matrices[n].dtype for n, kind in kinds.items()):
        return Certificate("none", f"weights are rounded ({said})", None)
    if warnings:
        return Certificate("none", f"weights are the source's ({said}); see the warnings", None)
    return Certificate("exact", f"every weight is the source's ({said})", None)


def _with(options: Asking, plan: str) -> Asking:
    """The options with a plan that was chosen."""
    return replace(options, plan=plan, target_size=None)


class _Laid(NamedTuple):
    """A plan, and the forms that stand in its files by the names of the output."""

    plan: Plan
    into: Mapping[str, reform.Into]
    warnings: Sequence[str]


def _laid(
    read: Sequence[Checkpoint], asked: Scheme, choice: Choice, rounding: JsonObject, most: int
) -> _Laid:
    """The plan that writes a choice; `most`: bytes of a file."""
    build = _built(read, choice)
    wanted = Outputs(read[0].config, build.targets, build.tasks, {})
    into = {
        name: reform.Into(a.form, a.params, rounding if forms.named(a.form).searched else {})
        for name, a in choice.formats.items()
    }
    kept = {n: reform.Into(p.form, p.params, kept=True) for n, p in choice.kept.items()}
    made = to_gguf.Arranged(wanted, {**kept, **into})
    if asked.container == "gguf":
        made = to_gguf.arranged(read, wanted, into, choice.matrices)
    plan = reform.plan(read, made.wanted, max_shard=most, form="full", into=made.into)
    return _Laid(plan, to_gguf.forms_in(plan, into), made.warnings)


def _built(read: Sequence[Checkpoint], choice: Choice) -> Builder:
    """Targets and tasks in file order: each matrix from what was solved for it, else its source."""
    source, *solved = read
    build, begun = Builder(), _by_tensor(choice)
    for name, stored in source.tensors.items():
        for matrix in begun.get(name, ()):
            target = build.target(matrix.name, matrix.dtype, matrix.shape)
            number = _solved(solved, matrix.name)
            found = whole(read[number].tensor(matrix.name), number) if number else matrix.piece
            build.copy(found, whole(target))
        if name not in begun:
            build.copy(whole(stored), whole(build.target(name, stored.dtype, stored.shape)))
    return build


def _solved(solved: Sequence[Checkpoint], name: str) -> int:
    """The number of the source that was solved for a matrix; 0: none."""
    return next((i for i, s in enumerate(solved, 1) if name in s.tensors), 0)


def _promised(
    read: Sequence[Checkpoint], choice: Choice, into: Mapping[str, reform.Into]
) -> tuple[Pledge, ...]:
    """The matrices that get a form, to be read back."""
    return tuple(
        Pledge(
            name,
            choice.matrices[name].role,
            choice.matrices[name].piece,
            asked.form,
            asked.params,
            asked.rounding,
            solved=_solved(read[1:], name) > 0,
        )
        for name, asked in into.items()
    )


def _by_tensor(choice: Choice) -> dict[str, list[Matrix]]:
    """Stored tensor -> the matrices that lie in it."""
    found: dict[str, list[Matrix]] = {}
    for matrix in choice.matrices.values():
        found.setdefault(matrix.piece.name, []).append(matrix)
    return found


def _quantized(summary: Summary) -> Quantized:
    return cast("Quantized", summary.facts)
