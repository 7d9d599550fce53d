"""Are the small parts of packed matrices what a loader takes them for? Headers do not say it: a
scale that is no number, a code that stands for nothing, a place outside of its matrix.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator

from moetool.errors import MoetoolError
from moetool.kernels import codec
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import FLOATS, Stored, whole

_NAN = {"U8": (255,), "F8_E8M0": (255,), "F8_E4M3": (127, 255)}  # bytes that are no scale


def check(checkpoint: Checkpoint) -> None:
    """Refuse experts of groups with a part that cannot be right; what they share with others, and
    matrices in other forms, are not read.
    """
    own = (p for p in parts(checkpoint, _in_groups) if p[0].name not in checkpoint.tensors)
    for part, wrong in flaws(checkpoint, own):
        raise MoetoolError(
            "a part of a packed matrix is damaged",
            file=f"{checkpoint.folder}/{part.file}",
            tensor=part.name,
            expected=wrong[0],
            found=wrong[1],
            hint="download the checkpoint again, or make it again",
        )


def _in_groups(form: forms.Form) -> bool:
    return form.in_groups


def parts(
    checkpoint: Checkpoint, wanted: Callable[[forms.Form], bool]
) -> Iterator[tuple[Stored, Stored]]:
    """Every part of the packed matrices in forms that are wanted, with its matrix."""
    for matrix in checkpoint.tensors.values():
        if matrix.parts is not None and wanted(forms.named(matrix.parts.form)):
            for part in matrix.parts.tensors:
                yield part, matrix


def flaws(
    checkpoint: Checkpoint, looked_at: Iterable[tuple[Stored, Stored]]
) -> Iterator[tuple[Stored, tuple[str, str]]]:
    """Parts that cannot be right, each with what it should be and is."""
    for part, matrix in looked_at:
        if wrong := flaw(checkpoint, part, matrix):
            yield part, wrong


def flaw(checkpoint: Checkpoint, part: Stored, matrix: Stored) -> tuple[str, str] | None:
    """What a part of a matrix should be and is, where it cannot be right."""
    import numpy as np

    assert matrix.parts is not None
    word = part.name.rpartition(".")[2]
    if word == "weight_shape":
        data = checkpoint.content(part)
        said = list(struct.unpack(f"<{len(data) // 8}q", data))
        return None if said == list(matrix.shape) else (str(list(matrix.shape)), str(said))
    good = True
    if part.dtype in FLOATS:
        values = codec.as_float64(checkpoint.read(whole(part)), part.dtype)
        good = bool(np.isfinite(values).all())
    elif "scale" in word and part.dtype in _NAN:
        good = not any(bytes((b,)) in checkpoint.content(part) for b in _NAN[part.dtype])
    form = forms.named(matrix.parts.form)
    if good and form.whole_numbers(part.name):
        return form.flaw(part, checkpoint.content(part), matrix)
    return None if good else ("finite scales", "NaN or inf")
