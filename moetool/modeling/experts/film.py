"""Feature-wise modulation: each expert scales and shifts what the FFN gives."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.modeling.block import FfnLinears, GroupedBlock, Picked
from moetool.modeling.experts.group import Expert, ExpertGroup
from moetool.modeling.experts.map import PlainMap
from moetool.surgery.groups import Group
from moetool.surgery.strict import Kinds


class FilmExperts(ExpertGroup):
    """(1 + scale(h)) * h + shift(h), h the FFN's output. No params."""

    name: ClassVar[str] = "film"
    bases: ClassVar[tuple[str, ...]] = ("under",)
    knows: ClassVar[Kinds] = {}

    def one(self, group: Group, linears: FfnLinears) -> Expert:
        hidden = linears.given
        names = ("film_scale", "film_shift")
        return Expert(((name, PlainMap(hidden, hidden, bias=True)) for name in names), {})

    def run(self, block: GroupedBlock, x: Tensor, picked: Picked) -> Tensor:
        def change(number: int, mine: Tensor) -> Tensor:
            expert = self[number]
            scale, shift = (expert.get_submodule(f"film_{n}")(mine) for n in ("scale", "shift"))
            made: Tensor = scale.mul(mine).add(shift)
            return made

        rows = picked.rows(block.ffn(x))
        return picked.back(picked.weighted(rows + picked.each(rows, change)))
