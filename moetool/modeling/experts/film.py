"""Feature-wise modulation: each expert scales and shifts what a module gives."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.modeling.block import FfnLinears
from moetool.modeling.experts.adding import AddingExperts
from moetool.modeling.experts.group import Expert
from moetool.modeling.experts.map import PlainMap
from moetool.surgery.groups import Group
from moetool.surgery.strict import Kinds


class FilmExperts(AddingExperts):
    """(1 + scale(h)) * h + shift(h), h the module's output. No params."""

    name: ClassVar[str] = "film"
    knows: ClassVar[Kinds] = {}

    def one(self, group: Group, linears: FfnLinears) -> Expert:
        hidden = linears.given
        names = ("film_scale", "film_shift")
        return Expert(((name, PlainMap(hidden, hidden, bias=True)) for name in names), {})

    def made(self, number: int, rows: Tensor) -> Tensor:
        scale, shift = (self[number].get_submodule(f"film_{n}")(rows) for n in ("scale", "shift"))
        made: Tensor = scale.mul(rows).add(shift)
        return made
