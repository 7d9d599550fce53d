"""Which matrix gets which format: what the user asked for, held against what is there, before any
work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moetool.errors import MoetoolError, UsageError, did_you_mean
from moetool.methods.quantize.options import Quantizing
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.forms import Spelled
from moetool.surgery.roles import ROLES, Matrix, Roles
from moetool.surgery.spec import Target

EVERY_LINEAR = ("experts", "shared", "dense", "attn")  # what --format means
FULL = "full"


@dataclass(frozen=True)
class Scheme:
    """A format by role; a role that is not named stays as it is."""

    roles: Mapping[str, Spelled]

    @classmethod
    def of(cls, options: Quantizing) -> Scheme:
        """What the options ask for; UsageError for words that mean nothing."""
        if not options.plan:
            asked = _spelled(options.format, options)
            beside = forms.named(asked.form).formats[asked.word].beside
            others = {role: _spelled(text, options) for role, text in beside.items()}
            return cls(dict.fromkeys(EVERY_LINEAR, asked) | others)
        roles: dict[str, Spelled] = {}
        for item in options.plan.split(","):
            role, _, text = (part.strip() for part in item.partition("="))
            if role not in ROLES or role in roles or not text:
                raise UsageError(
                    f"--plan {item!r} is no ROLE=FORMAT, or says a role twice",
                    expected=f"a role of {', '.join(ROLES)}",
                    found=role,
                    hint=did_you_mean(role, ROLES),
                )
            if text != FULL:
                roles[role] = _spelled(text, options)
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

    def loader(self, options: Quantizing) -> str:
        """Who must read it."""
        if options.for_ != "auto":
            return options.for_
        return "llama.cpp" if self.container == "gguf" else "transformers5"

    def __str__(self) -> str:
        return ",".join(f"{role}={asked}" for role, asked in self.roles.items())


def _spelled(text: str, options: Quantizing) -> Spelled:
    """A format with its params, under --force those that take any matrix."""
    asked = forms.asked(text, options.group_size)
    if not options.force:
        return asked
    return replace(asked, params=forms.named(asked.form).forced(asked.params))


@dataclass(frozen=True)
class Choice:
    """Every matrix with its format, and those that stay as they are, by name with the reason."""

    formats: Mapping[str, Spelled]  # by the name in the output
    matrices: Mapping[str, Matrix]
    left: Mapping[str, str] = field(default_factory=dict)


def choose(source: Checkpoint, scheme: Scheme) -> Choice:
    """Formats for the matrices of a checkpoint. Raises MoetoolError for a matrix that cannot take
    its format.
    """
    roles = Roles.of(source)
    formats: dict[str, Spelled] = {}
    left = dict(roles.without)
    for matrix in roles.matrices:
        asked = scheme.roles.get(matrix.role)
        if asked is None:
            left[matrix.name] = f"the plan leaves {matrix.role} as they are"
            continue
        given = forms.settled(asked, Target(matrix.name, matrix.dtype, matrix.shape))
        _check(source, matrix, given)
        formats[matrix.name] = given
    _one_method(source, formats, roles, left)
    if not formats:
        raise MoetoolError(
            "nothing in this model takes part in the plan",
            file=source.folder,
            expected=f"matrices of {', '.join(scheme.roles)}",
            found=", ".join(sorted({m.role for m in roles.matrices})) or "none",
            hint="`moetool inspect` says what is there",
        )
    return Choice(formats, {m.name: m for m in roles.matrices}, left)


def _one_method(
    source: Checkpoint, formats: dict[str, Spelled], roles: Roles, left: dict[str, str]
) -> None:
    """A model has one quantizer. Where a format means another for the experts (gpt-oss's stacks have
    an mxfp4 of their own), what only the usual one holds is left full; else this is refused.
    """
    methods = {name: forms.named(given.form).method for name, given in formats.items()}
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


def _check(source: Checkpoint, matrix: Matrix, asked: Spelled) -> None:
    """Refuse a matrix that its format cannot hold."""
    target = Target(matrix.name, matrix.dtype, matrix.shape)
    why = forms.named(asked.form).misfit(target, asked.params)
    if why:
        raise MoetoolError(
            f"{asked} does not hold this matrix: {why}",
            file=source.folder,
            tensor=matrix.name,
            found=f"{matrix.dtype} {list(matrix.shape)}",
            hint=_advice(matrix, asked),
        )


def _advice(matrix: Matrix, asked: Spelled) -> str:
    """What to ask for instead."""
    groups = forms.named(asked.form).formats[asked.word].groups
    target = Target(matrix.name, matrix.dtype, matrix.shape)
    able = [
        f"{asked.word}/{group or 'channel'}"
        for group in sorted(groups, reverse=True)
        if forms.named(asked.form).fits(target, {**asked.params, "group": group})
    ]
    if able:
        return f"ask for {' or '.join(able)}"
    return f"leave these out with --plan ({matrix.role}=full), or choose another format"
