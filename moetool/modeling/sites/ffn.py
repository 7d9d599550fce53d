"""The FFN of a layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moetool.modeling.block import FfnLinears, Grouped, GroupedBlock
from moetool.modeling.residual_block import ResidualBlock
from moetool.modeling.sites.site import GroupSite, wrong
from moetool.modeling.step_block import StepBlock
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import EMPTY, PART, Group


class FfnSite(GroupSite):
    """Experts are FFNs in the place of it, under it or beside it."""

    name = "ffn"
    kind = GroupedBlock

    def kind_of(self, block: FfnBlock) -> type[Grouped]:
        if block.steps:
            return StepBlock
        return ResidualBlock if block.residual else self.kind

    def check(self, module: Grouped, group: Group) -> None:
        super().check(module, group)
        if group.form == PART:
            _check_parts(module.linears, group)
        keeps = group.form == EMPTY or group.params.get("at") == "before"
        if keeps and module.linears.hidden != module.linears.given:
            raise wrong(
                f"{group.form} experts at an FFN that changes the width of what goes through it",
                f"{module.linears.hidden} -> {module.linears.hidden}",
                f"{module.linears.hidden} -> {module.linears.given}",
            )

    def grow(self, module: nn.Module, block: FfnBlock, groups: Sequence[Group]) -> None:
        super().grow(module, block, groups)
        if isinstance(module, StepBlock):
            module.steps = block.steps


def _check_parts(linears: FfnLinears, group: Group) -> None:
    """Refuse parts that do not cut the FFN."""
    width = linears.shapes[linears.out][1]
    parts = int(group.params.get("shared", 0)) + group.experts
    if width % parts:
        raise wrong(
            "parts of an FFN that cannot be cut so",
            "a divisor of its width",
            f"{parts} parts of {width} neurons",
        )
