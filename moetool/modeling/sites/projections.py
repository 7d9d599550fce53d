"""Experts that are projections of a module: what sites share whose stock forward calls linears."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from moetool.modeling.block import FfnLinears, Grouped, Picked
from moetool.modeling.experts.full import FullExperts
from moetool.modeling.experts.group import Expert
from moetool.surgery.groups import MIXES, Group
from moetool.surgery.strict import Kinds


class GroupedProjections(Grouped):
    """A module with one group of experts, whose projections each token has of its own."""

    @property
    def whole(self) -> Group | None:
        """The group that stands for projections, where there is one."""
        return next((group for group, _ in self.held if group.base != "beside"), None)

    def part(self, choice: int, name: str) -> nn.Module:
        """A projection of the expert behind a choice: of `member` groups the first is the module's
        own, and so are those that experts do not have.
        """
        group, own = self.whole, getattr(self, name, None)
        assert group is not None
        number = choice - (group.base == "member")
        if number < 0 or not group.has(name):
            assert own is not None
            return own  # type: ignore[no-any-return]
        return self.get_submodule(group.expert(number, name))

    def mixed(self, name: str, picked: Picked, x: Tensor) -> Tensor:
        """A projection of x [..., in], of each token by its own experts."""
        rows = picked.rows(x.reshape(-1, x.shape[-1]))
        made = picked.each(rows, lambda choice, mine: self.part(choice, name)(mine))
        return picked.back(picked.weighted(made)).view(*x.shape[:-1], -1)


class ProjectionExperts(FullExperts):
    """Projections of their own. params: mix, and with `outputs` targets, those that they have."""

    knows: ClassVar[Kinds] = {"mix": MIXES, "targets": list}

    def one(self, group: Group, linears: FfnLinears) -> Expert:
        own = filter(group.has, linears.names)
        return Expert(((name, self.part(group.params, linears, name)) for name in own), {})
