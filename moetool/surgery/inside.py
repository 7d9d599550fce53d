"""Experts that are no FFN of their own: the tensors that each has instead of a matrix for every
linear. One entry a form; `hidden` in a shape is the width of a token, every other word one of the
group's params.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moetool.data import JsonObject


class ExpertTensor(NamedTuple):
    """A tensor of an expert: `adapter_up.weight` [hidden, dim]. `zero`: it is zero at birth."""

    name: str
    shape: tuple[str, ...]
    zero: bool = True

    def sides(self, hidden: int, params: JsonObject) -> tuple[int, ...]:
        """Its shape in numbers."""
        return tuple(hidden if word == "hidden" else int(params[word]) for word in self.shape)


_SQUARE, _ROW = ("hidden", "hidden"), ("hidden",)
HELD: Mapping[str, tuple[ExpertTensor, ...]] = {
    "part": (),  # heads of an attention (MoH, arXiv 2410.11842)
    # h + up(act(down h)), h the FFN's output or its input (PESC, arXiv 2401.02731; LaVIN)
    "adapter": (
        ExpertTensor("adapter_down.weight", ("dim", "hidden"), zero=False),
        ExpertTensor("adapter_up.weight", ("hidden", "dim")),
    ),
    # (1 + scale(h)) * h + shift(h), h the FFN's output (MoFME, arXiv 2312.16610)
    "film": (
        ExpertTensor("film_scale.weight", _SQUARE),
        ExpertTensor("film_scale.bias", _ROW),
        ExpertTensor("film_shift.weight", _SQUARE),
        ExpertTensor("film_shift.bias", _ROW),
    ),
}


def inside(form: str) -> Iterator[ExpertTensor]:
    """What an expert of a form has; nothing for forms of whole FFNs."""
    return iter(HELD.get(form, ()))
