"""Experts that add to what goes through a module: h + the weighted sum of what each makes of h."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.modeling.block import GroupedBlock, Picked
from moetool.modeling.experts.group import ExpertGroup


class AddingExperts(ExpertGroup):
    """Subclass it in a file of this folder and say what an expert makes of rows (`made`). `before`:
    of what goes into the module, not of what comes out; `keeps`: the factor on what they add to.
    """

    bases: ClassVar[tuple[str, ...]] = ("under",)
    before: bool = False
    keeps: float = 1.0

    def made(self, number: int, rows: Tensor) -> Tensor:
        """What one expert adds to rows [rows, hidden]."""
        raise NotImplementedError

    def added(self, x: Tensor, picked: Picked) -> Tensor:
        """x [tokens, hidden] -> what the experts of each token add to it together."""
        return picked.back(picked.weighted(picked.each(picked.rows(x), self.made)))

    def run(self, block: GroupedBlock, x: Tensor, picked: Picked) -> Tensor:
        if self.before:
            rows = picked.rows(x)
            return picked.back(picked.weighted(block.own_ffn(rows + picked.each(rows, self.made))))
        rows = picked.rows(block.own_ffn(x))  # once, however many experts see it
        made = picked.each(rows, self.made)
        whole = rows + made if self.keeps == 1.0 else self.keeps * rows + made
        return picked.back(picked.weighted(whole))
