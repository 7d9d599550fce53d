"""What was solved, as a source of the plan: matrices already in the parts of their forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moetool.methods.quantize.choice import Choice
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.forms.form import made_of
from moetool.surgery.headers import read_header
from moetool.surgery.roles import Matrix
from moetool.surgery.spec import InParts, Stored, Target


def parts(matrix: Matrix, choice: Choice) -> tuple[Target, ...]:
    """What lies in a file for a matrix in the format chosen for it."""
    asked, target = choice.formats[matrix.name], Target(matrix.name, matrix.dtype, matrix.shape)
    return forms.named(asked.form).parts(target, asked.params)


def source(folder: Path, choice: Choice) -> Checkpoint:
    """The files of solved tensors as a checkpoint whose matrices are in the forms chosen for
    them, under the names of the output.
    """
    lying: dict[str, Stored] = {}
    files: dict[str, tuple[int, str]] = {}
    for path in sorted(folder.glob("solved-*.safetensors")):
        header = read_header(path)
        files[path.name] = (header.size, header.seal)
        lying |= {t.name: t for t in header.tensors}
    return Checkpoint(str(folder), {}, _matrices(choice, lying), files, lying)


def again(known: Checkpoint, choice: Choice) -> Checkpoint:
    """The same of a source of which the headers alone are known (`verify`)."""
    return (
        known
        if known.lying
        else replace(known, tensors=_matrices(choice, known.tensors), lying=known.tensors)
    )


def _matrices(choice: Choice, lying: Mapping[str, Stored]) -> dict[str, Stored]:
    found = {}
    for name, asked in choice.formats.items():
        matrix = choice.matrices[name]
        held = [lying.get(part.name) for part in parts(matrix, choice)]
        if all(held):
            made = InParts(asked.form, tuple(t for t in held if t is not None), asked.params)
            found[name] = made_of(asked.form, name, matrix.dtype, matrix.shape, made)
    return found
