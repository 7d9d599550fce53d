"""The FFN of a layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moetool.modeling.block import Grouped, GroupedBlock
from moetool.modeling.sites.site import GroupSite
from moetool.modeling.step_block import StepBlock
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import Group


class FfnSite(GroupSite):
    """Experts are FFNs in the place of it, under it or beside it."""

    name = "ffn"
    kind = GroupedBlock

    def kind_of(self, block: FfnBlock) -> type[Grouped]:
        return StepBlock if block.steps else self.kind

    def grow(self, module: nn.Module, block: FfnBlock, groups: Sequence[Group]) -> None:
        super().grow(module, block, groups)
        if isinstance(module, StepBlock):
            module.steps = block.steps
            module.paths = {linear.name: linear.path for linear in block.linears}
