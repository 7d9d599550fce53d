"""Which matrix gets which format: what the user asked for, held against what is there, before any
work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from moetool.errors import MoetoolError, UsageError, did_you_mean
from moetool.methods.quantize import already, refuse
from moetool.methods.quantize.choice import Choice
from moetool.methods.quantize.options import DEFAULT, Quantizing
from moetool.methods.quantize.refuse import FULL
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.forms import Spelled
from moetool.surgery.forms.form import float_of
from moetool.surgery.roles import ROLES, Matrix, Roles
from moetool.surgery.spec import Target

EVERY_LINEAR = ("experts", "shared", "dense", "attn")  # what --format means


@dataclass(frozen=True)
class Scheme:
    """A format by role; a role that is not named stays as it is."""

    roles: Mapping[str, Spelled]

    @classmethod
    def of(cls, options: Quantizing) -> Scheme:
        """What the options ask for; UsageError for words that mean nothing."""
        if not options.plan:
            asked = _spelled(options.format or DEFAULT, options)
            beside = forms.named(asked.form).formats[asked.word].beside
            others = {role: _spelled(text, options) for role, text in beside.items()}
            return cls(dict.fromkeys(EVERY_LINEAR, asked) | others)
        if options.format:
            raise UsageError(
                "--format and --plan exclude each other",
                found=f"--format {options.format} --plan {options.plan}",
                hint="say it by role in --plan, or leave it out",
            )
        named = _named(options.plan)
        roles = {r: _spelled(text, options) for r, text in named.items() if text != FULL}
        if not roles:
            raise UsageError("--plan leaves everything full", hint="use `moetool dequantize`")
        if len({forms.named(asked.form).container for asked in roles.values()}) > 1:
            raise UsageError(
                "--plan mixes formats of GGUF files with others, and one file cannot hold both",
                found=options.plan,
                hint="write gguf: before each, or before none",
            )
        return cls(roles)

    @property
    def container(self) -> str:
        """The file format that can hold these."""
        return forms.named(next(iter(self.roles.values())).form).container

    def loaders(self, options: Quantizing) -> tuple[str, ...]:
        """Who must read it."""
        usual = "llama.cpp" if self.container == "gguf" else "transformers5"
        return options.named or (usual,)

    def __str__(self) -> str:
        return ",".join(f"{role}={asked}" for role, asked in self.roles.items())


def _named(plan: str) -> dict[str, str]:
    """--plan as role -> format; UsageError for what is not one."""
    found: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in plan.split(","))):
        role, _, text = (part.strip() for part in item.partition("="))
        problem = ""
        if not text:
            problem = f"--plan {item!r} is no ROLE=FORMAT"
        elif role not in ROLES:
            problem = f"--plan names no role {role!r}"
        elif found.get(role, text) != text:
            problem = f"--plan gives {role} two formats"
        if problem:
            raise UsageError(
                problem,
                expected=f"a role of {', '.join(ROLES)}",
                found=plan,
                hint=did_you_mean(role, ROLES) if role not in ROLES else f"say {role}=FORMAT once",
            )
        found[role] = text
    return found


def _spelled(text: str, options: Quantizing) -> Spelled:
    """A format with its params, under --force those that take any matrix."""
    asked = forms.asked(text, options.group_size)
    if not options.force:
        return asked
    return replace(asked, params=forms.named(asked.form).forced(asked.params))


def choose(source: Checkpoint, scheme: Scheme, options: Quantizing) -> Choice:
    """Formats for the matrices of a checkpoint. Raises MoetoolError for all that can be known of
    headers alone: see refuse.py.
    """
    refuse.unreadable(source)
    roles = Roles.of(source)
    if options.plan:
        refuse.absent(source, scheme.roles, roles.matrices)
    formats: dict[str, Spelled] = {}
    misfits: list[tuple[Matrix, Spelled, str]] = []
    left = dict(roles.without)
    for matrix in roles.matrices:
        asked = scheme.roles.get(matrix.role)
        if asked is None:
            left[matrix.name] = f"the plan leaves {matrix.role} as they are"
            continue
        target = Target(matrix.name, _scaled(source, matrix), matrix.shape)
        given = forms.settled(asked, target)
        if why := forms.named(given.form).misfit(target, given.params):
            misfits.append((matrix, given, why))
        formats[matrix.name] = given
    there = {m.role: scheme.roles[m.role] for m in roles.matrices if m.role in scheme.roles}
    refuse.misfits(source, misfits, there)
    _one_method(source, formats, roles, left)
    if not formats:
        raise _nothing(source, scheme, roles)
    choice = already.kept(source, Choice(formats, {m.name: m for m in roles.matrices}, left))
    refuse.done(source, choice)
    for loader in scheme.loaders(options):
        told = refuse.unread(source, choice, loader, force=options.force)
        choice = replace(choice, warnings=(*choice.warnings, *told))
    return choice


def _scaled(source: Checkpoint, matrix: Matrix) -> str:
    """The dtype of what scales a matrix: its own, but float32 where the model has another one.
    Loaders compute with a matrix in the dtype of its scales, which is then neither's.
    """
    return matrix.dtype if matrix.dtype == float_of(source.config, matrix.dtype) else "F32"


def _nothing(source: Checkpoint, scheme: Scheme, roles: Roles) -> MoetoolError:
    """No matrix takes part: which roles there are, and why most others have none."""
    there = ", ".join(dict.fromkeys(m.role for m in roles.matrices)) or "none"
    reasons = Counter(roles.without.values()).most_common(1)
    return MoetoolError(
        "nothing in this model takes part in the plan",
        file=source.folder,
        expected=f"matrices of {', '.join(scheme.roles)}",
        found="; ".join([there, *(f"{count} matrices left: {why}" for why, count in reasons)]),
        hint="`moetool inspect` says what is there",
    )


def _one_method(
    source: Checkpoint, formats: dict[str, Spelled], roles: Roles, left: dict[str, str]
) -> None:
    """A model has one quantizer. Where a format means another for the experts (the stacks of
    gpt-oss have an mxfp4 of their own), what only the usual one holds is left full; else this is
    refused.
    """
    methods = {name: forms.named(given.form).quant_method for name, given in formats.items()}
    if len(set(methods.values())) < 2:
        return
    words = {given.word for given in formats.values()}
    experts = {methods[m.name] for m in roles.matrices if m.role == "experts" and m.name in methods}
    if len(words) > 1 or len(experts) != 1:
        raise MoetoolError(
            "these formats need two quantizers, and a model has one",
            file=source.folder,
            expected="formats of one `quant_method`",
            found="; ".join(sorted({f"{g.word}: {methods[n]}" for n, g in formats.items()})),
            hint="choose formats of one kind, or leave a role full in --plan",
        )
    (kept,) = experts
    for name in [n for n, method in methods.items() if method != kept]:
        left[name] = f"beside experts in {kept}, nothing else is quantized"
        del formats[name]
