"""Bottleneck adapters on the FFN: each expert changes what goes out of it, or into it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from moetool.modeling.block import FfnLinears, GroupedBlock, Picked
from moetool.modeling.experts.group import Expert, ExpertGroup
from moetool.modeling.experts.map import PlainMap
from moetool.surgery.groups import Group
from moetool.surgery.strict import Kinds


class AdapterExperts(ExpertGroup):
    """params: dim, the bottleneck's width, and `at`: after (the usual) or before the FFN."""

    name: ClassVar[str] = "adapter"
    bases: ClassVar[tuple[str, ...]] = ("under",)
    needs: ClassVar[Kinds] = {"dim": int}
    knows: ClassVar[Kinds] = {"at": ("after", "before")}

    def __init__(self, group: Group, linears: FfnLinears) -> None:
        super().__init__(group, linears)
        self.before = group.params.get("at") == "before"

    def one(self, group: Group, linears: FfnLinears) -> Expert:
        dim, hidden = group.params["dim"], linears.given
        down = PlainMap(dim, hidden, drawn=True)
        return Expert((("adapter_down", down), ("adapter_up", PlainMap(hidden, dim))), {})

    def run(self, block: GroupedBlock, x: Tensor, picked: Picked) -> Tensor:
        if self.before:
            return picked.back(picked.weighted(block.ffn(self._changed(picked.rows(x), picked))))
        made = block.ffn(x)  # once, however many experts see it
        return picked.back(picked.weighted(self._changed(picked.rows(made), picked)))

    def _changed(self, rows: Tensor, picked: Picked) -> Tensor:
        """h + up(gelu(down h)), each row by its expert."""

        def change(number: int, mine: Tensor) -> Tensor:
            down, up = (self[number].get_submodule(f"adapter_{n}") for n in ("down", "up"))
            made: Tensor = up(functional.gelu(down(mine)))
            return made

        return rows + picked.each(rows, change)
