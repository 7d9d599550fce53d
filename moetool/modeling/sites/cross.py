"""The attention of a decoder's layer to what the encoder gives: queries and the output are
projected by the experts of the decoder's tokens, keys and values by those of the encoder's.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from moetool.modeling.block import Picked
from moetool.modeling.sites.attention import AttentionSite, GroupedAttention
from moetool.surgery.groups import Group


class GroupedCross(GroupedAttention):
    """An attention module that looks at others' tokens, with groups of experts."""

    @property
    def own_into(self) -> tuple[str, ...]:
        return self.linears.into[:1]

    def projected(self, group: Group, picked: Picked, x: Tensor) -> dict[str, Any]:
        query, *theirs = self.linears.into
        own = {name: partial(self.mixed, name, picked) for name in (query, self.linears.out)}
        return own | {name: partial(self._other, group, name) for name in theirs}

    def _other(self, group: Group, name: str, x: Tensor) -> Tensor:
        """A projection of others' tokens x [..., hidden], by their own experts."""
        law = next(law for held, law in self.held if held is group)
        return self.mixed(name, self.picked(group, law, x.reshape(-1, x.shape[-1])), x)


class CrossSite(AttentionSite):
    """One group of whole projections, and what is added around them."""

    name = "cross"
    kind = GroupedCross
    forms: ClassVar[tuple[str, ...]] = ("full", "adapter", "film")
