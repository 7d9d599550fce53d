"""The linears of a layer, each with a router of its own over what it sees: y = W x + the weighted
sum of what the token's experts add (Rocket; X-LoRA's scalings, one linear at a time).
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from moetool.modeling import experts
from moetool.modeling.block import FfnLinears, Grouped, GroupedBlock, Picked
from moetool.modeling.experts.delta import AddedLinear, DeltaExperts
from moetool.modeling.experts.group import ExpertGroup
from moetool.modeling.sites.site import GroupSite
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import LINEAR, Group

WHOLE = ""  # a linear's name inside itself


class GroupedLinear(Grouped):
    """A linear with groups of experts."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        made: Tensor = self.stock.forward(self, input)
        x, total = input.reshape(-1, input.shape[-1]), made.reshape(-1, made.shape[-1])
        for group, law in self.held:
            picked = self.picked(group, law, x)
            if not picked.runs:  # no token is of a kind that has experts
                continue
            added = getattr(self, group.name).run(self, x, picked)
            total = total + (added if group.scale == 1.0 else added * group.scale)
        return total.view(made.shape)


class LinearExperts(ExpertGroup):
    """What each expert adds to one linear. params: those of the form, and `linears`, the names of
    the linears of a layer that have experts (all, where not said).
    """

    bases = ("beside",)

    def __init__(self, group: Group, linears: FfnLinears) -> None:
        self.form = cast(type[DeltaExperts], experts.forms()[group.form])
        self.needs = self.form.needs  # type: ignore[misc]
        knows = {n: kind for n, kind in self.form.knows.items() if n != "mix"}
        self.knows = {**knows, "linears": list}  # type: ignore[misc]
        super().__init__(group, linears)

    def one(self, group: Group, linears: FfnLinears) -> AddedLinear:
        return self.form.adding(group)(linears.shapes[WHOLE])

    def run(self, block: GroupedBlock, x: Tensor, picked: Picked) -> Tensor:
        made = picked.each(picked.rows(x), lambda choice, rows: self[choice](rows))
        return picked.back(picked.weighted(made))


class LinearSite(GroupSite):
    """Experts are what is added to a linear."""

    name = LINEAR
    kind = GroupedLinear
    forms = ("kbit", "lora", "sparse")
    bases = ("beside",)

    def linears(self, module: nn.Module, block: FfnBlock) -> FfnLinears:
        one, other = module.get_parameter("weight").shape
        turned = not isinstance(module, nn.Linear)  # Conv1D
        shape = (other, one) if turned else (one, other)
        return FfnLinears((WHOLE,), WHOLE, {WHOLE: shape}, frozenset(), turned)

    def experts(self, group: Group, linears: FfnLinears) -> nn.Module:
        return LinearExperts(group, linears)
