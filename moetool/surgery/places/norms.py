"""The norms of a layer, each by itself."""

from __future__ import annotations

from moetool.surgery.ffn import FfnBlock
from moetool.surgery.layout import Layout
from moetool.surgery.places import words
from moetool.surgery.places.place import GroupPlace


class NormsPlace(GroupPlace):
    """its norms, each by itself"""

    name = "norms"
    noun = "norm"

    def blocks(self, layout: Layout) -> tuple[FfnBlock, ...]:
        found = words.linears(layout, self.name)
        return tuple(FfnBlock(one.slot.name.removesuffix(".weight"), (one,)) for one in found)
