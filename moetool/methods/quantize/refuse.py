"""What quantize will not do, each in a sentence before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from moetool.errors import MoetoolError, UsageError
from moetool.surgery import clients, forms, scan
from moetool.surgery.clients import Assigned
from moetool.surgery.forms import Spelled
from moetool.surgery.forms.form import float_of
from moetool.surgery.roles import Matrix
from moetool.surgery.spec import Target, Task, whole

if TYPE_CHECKING:
    from moetool.methods.contract import Settings
    from moetool.methods.quantize.choice import Choice
    from moetool.surgery.checkpoint import Checkpoint

KEY = "quantization_config"
FULL = "full"
_SHOWN = 5
_USUAL = ("int4", "int8", "fp8", "mxfp4", "nf4", "gguf:q4_0", "gguf:q8_0")


def unreadable(source: Checkpoint) -> None:
    """A checkpoint that is quantized in a form that no file of surgery/forms/ reads."""
    said = source.config.get(KEY)
    if not said:
        return
    kind = said.get("quant_method", "?") if isinstance(said, dict) else said
    more = f", {said['format']}" if isinstance(said, dict) and "format" in said else ""
    raise MoetoolError(
        f"the source is quantized already, by {kind}{more}, which moetool does not read",
        file=source.folder,
        expected="full weights, or a form that `moetool inspect` names",
        found=f"{KEY}: quant_method {kind}",
        hint="give the model that it was made from",
    )


def misfits(
    source: Checkpoint,
    found: Sequence[tuple[Matrix, Spelled, str]],
    asked_of: Mapping[str, Spelled],
) -> None:
    """Matrices that their formats do not hold: all counted, the first named. `asked_of`: the format
    of each role that the model has.
    """
    if not found:
        return
    failing = {m.role for m, _, _ in found}
    rest = {role: str(a) for role, a in asked_of.items() if role not in failing}
    matrix, asked, why = found[0]
    same = [m for m, a, _ in found if a == asked and m.role == matrix.role]
    raise MoetoolError(
        f"{asked} does not hold this matrix: {why}",
        file=source.folder,
        tensor=matrix.name,
        found=f"{matrix.dtype} {list(matrix.shape)}, and {len(found) - 1} more such matrices",
        hint=_advice(same, asked, rest),
    )


def _advice(matrices: Sequence[Matrix], asked: Spelled, rest: Mapping[str, str]) -> str:
    """What to ask for instead: groups that all of these can have, or the roles without them."""
    form = forms.named(asked.form)
    shapes = {(m.dtype, m.shape): Target(m.name, m.dtype, m.shape) for m in matrices}
    able = [
        f"{asked.word}/{group or 'channel'}"
        for group in sorted(form.formats[asked.word].groups, reverse=True)
        if all(form.fits(t, {**asked.params, "group": group}) for t in shapes.values())
    ]
    if able:
        return f"ask for {', '.join(able[:-1])}{' or ' if able[1:] else ''}{able[-1]}"
    without = ",".join(f"{role}={said}" for role, said in rest.items())
    return (
        f'leave them out (--plan "{without}"), or choose another format'
        if without
        else ("choose another format")
    )


def absent(source: Checkpoint, named: Iterable[str], matrices: Iterable[Matrix]) -> None:
    """A role that --plan names and the model has no matrices for."""
    there = dict.fromkeys(m.role for m in matrices)
    for role in named:
        if role not in there:
            raise UsageError(
                f"--plan gives {role} a format, and the model has no such matrices",
                file=source.folder,
                expected=f"roles of {', '.join(there)}",
                found=role,
                hint=f"leave {role} out of --plan",
            )


def done(source: Checkpoint, choice: Choice) -> None:
    """Nothing to do: every matrix is in its form already."""
    stored = {n: source.tensors.get(n) for n in choice.formats}
    held = {n: s.parts for n, s in stored.items() if s is not None and s.parts is not None}
    if len(held) < len(stored):
        return
    if all((held[n].form, held[n].params) == (a.form, a.params) for n, a in choice.formats.items()):
        raise UsageError(
            f"the source is {' and '.join(sorted({str(a) for a in choice.formats.values()}))} "
            "already: there is nothing to do",
            file=source.folder,
            hint="choose another format, or copy the folder",
        )


def unread(source: Checkpoint, choice: Choice, loader: str, *, force: bool) -> tuple[str, ...]:
    """What the loader would not read, or read wrongly. With `force` as warnings."""
    assigned = written(source, choice)
    found = clients.refusals(loader, assigned)
    if all(r.through for r in found):
        also = "".join(f", and {n} too (--for)" for n in _readers(assigned))
        return tuple(f"{r.said}; {r.through}(OUT) reads it{also}" for r in found)
    if force:
        return tuple(f"written by --force: {r.said}" for r in found)
    first, *rest = found
    raise UsageError(
        first.said,
        file=source.folder,
        expected=f"formats that {loader} reads",
        found="; ".join(r.said for r in rest) or None,
        hint=_instead(assigned, loader),
    )


def written(source: Checkpoint, choice: Choice) -> list[Assigned]:
    """Every matrix of the output, with its form."""
    return [_assigned(source, choice, m) for m in choice.matrices.values()]


def _assigned(source: Checkpoint, choice: Choice, matrix: Matrix) -> Assigned:
    asked = choice.formats.get(matrix.name)
    held = asked or choice.kept.get(matrix.name)
    return Assigned(
        role=matrix.role,
        form=held.form if held else FULL,
        params=held.params if held else {},
        said=str(asked or ""),
        name=matrix.name,
        shape=matrix.shape,
        layer=matrix.layer,
        bias=matrix.name.removesuffix("weight") + "bias" in source.tensors,
        dtype=float_of(source.config, matrix.dtype),
    )


def _instead(assigned: Sequence[Assigned], loader: str) -> str:
    """Experts with a format as well, formats that this loader reads, or loaders that read these."""
    rest = next(a for a in assigned if a.form != FULL)
    filled = [replace(rest, role=a.role) if _is_left(a) else a for a in assigned]
    advice = []
    if filled != list(assigned) and not clients.refusals(loader, filled):
        advice.append(f"give experts a format too (experts={rest.said})")
    words = [w for w in _words() if not clients.refusals(loader, _all_as(assigned, w))]
    advice += [f"--format {', '.join(words[:_SHOWN])}"] if words and not advice else []
    advice += [] if advice else [f"no format is known that {loader} reads of this model"]
    others = _readers(assigned)
    advice += [f"--for {' or '.join(others)}"] if others else []
    return "; ".join([*advice, "--force writes it all the same"])


def _readers(assigned: Sequence[Assigned]) -> list[str]:
    """The loaders that read all of it."""
    return [n for n in clients.clients() if not clients.refusals(n, assigned)]


def _is_left(one: Assigned) -> bool:
    return one.role == "experts" and one.form == FULL


def _words() -> list[str]:
    """The words of --format, those that most people want first."""
    first = [w for w in _USUAL if w in forms.formats()]
    return first + [w for w in forms.formats() if w not in first]


def _all_as(assigned: Sequence[Assigned], word: str) -> list[Assigned]:
    """Everything that gets a format, in this one."""
    made = forms.asked(word)
    return [
        replace(a, form=made.form, params=made.params, said=word) if a.form != FULL else a
        for a in assigned
    ]


def not_finite(source: Checkpoint, choice: Choice, settings: Settings) -> None:
    """NaN or inf in what will be rounded: libraries write NaN scales without a word."""
    read = {choice.matrices[name].piece.name for name in choice.formats}
    parts = chain.from_iterable(source.tensor(name).lying for name in sorted(read))
    tasks = [Task("copy", tuple(map(whole, parts)), ())]
    found = scan.suspects([source], tasks, tell=settings.tell, stop=settings.stop)
    bad = scan.named([source], tasks, found) if found else []
    if bad:
        raise MoetoolError(
            "weights that are to be rounded are not finite",
            file=bad[0].file,
            tensor=bad[0].name,
            found=f"{bad[0].what}, in {len(bad)} tensors",
            expected="finite values",
            hint="repair the checkpoint: one such weight takes all that share its scale with it",
        )
