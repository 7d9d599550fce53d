"""Gates on the values of an attention: of other modalities it sees little at first (PILL, arXiv
2311.02126).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moetool.modeling.block import FfnLinears, Picked
from moetool.modeling.experts.group import Expert, ExpertGroup
from moetool.modeling.experts.map import PlainMap
from moetool.surgery.groups import Group
from moetool.surgery.strict import Kinds


class GateExperts(ExpertGroup):
    """tanh(gate x) for each head of a token's values, x what the attention sees; the first choice
    leaves them as they are. params: heads, those that values have.
    """

    name: ClassVar[str] = "gate"
    bases: ClassVar[tuple[str, ...]] = ("member",)
    sites: ClassVar[tuple[str, ...]] = ("attention",)
    needs: ClassVar[Kinds] = {"heads": int}
    knows: ClassVar[Kinds] = {}

    def __init__(self, group: Group, linears: FfnLinears) -> None:
        super().__init__(group, linears)
        self.heads = int(group.params["heads"])

    def one(self, group: Group, linears: FfnLinears) -> Expert:
        gate = PlainMap(int(group.params["heads"]), linears.hidden)
        return Expert((("value_gate", gate),), {})

    def gated(self, x: Tensor, values: Tensor, picked: Picked) -> Tensor:
        """x [tokens, hidden] and values [tokens, width] -> values, times the gates of each token's
        experts.
        """

        def gates(choice: int, rows: Tensor) -> Tensor:
            if not choice:
                return rows.new_ones(len(rows), self.heads)
            made: Tensor = self[choice - 1].get_submodule("value_gate")(rows)
            return torch.tanh(made)

        each = picked.each(picked.rows(x), gates).unsqueeze(-1)
        rows = picked.rows(values)
        cut = rows.view(len(rows), self.heads, -1)
        return picked.back(picked.weighted((cut * each).flatten(-2)))
