"""Which formats gptq can solve into: those whose values lie on a grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moetool.methods.quantize.choice import Choice
from moetool.surgery import forms
from moetool.surgery.forms import Spelled
from moetool.surgery.spec import Shape

_ANY = (4096, 4096)


def has(asked: Spelled, shape: Shape = _ANY) -> bool:
    """Whether a matrix of this format is codes on a grid."""
    return forms.named(asked.form).grid(shape, asked.params) is not None


def without(choice: Choice) -> Iterator[str]:
    """The matrices whose format has none."""
    for name, asked in choice.formats.items():
        if not has(asked, choice.matrices[name].shape):
            yield name


def unsolvable(asked: Iterable[Spelled]) -> str:
    """`nvfp4 has no grid that gptq can solve into`."""
    words = sorted({one.word for one in asked})
    return (
        f"{', '.join(words)} {'has' if len(words) == 1 else 'have'} no grid that gptq solves into"
    )
