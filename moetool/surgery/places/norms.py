"""The norms of a layer, each by itself."""

from __future__ import annotations

from moetool.surgery.ffn import TURNED, FfnBlock, FfnLinear
from moetool.surgery.layout import Layout
from moetool.surgery.places import words
from moetool.surgery.places.place import GroupPlace


class NormsPlace(GroupPlace):
    """its norms, each by itself, those of queries and keys too"""

    name = "norms"
    noun = "norm"

    def blocks(self, layout: Layout) -> tuple[FfnBlock, ...]:
        found = (one.linear for one in words.linears(layout, self.name))
        heads = TURNED if words.among(layout, TURNED) else "tokens"
        inside = (_block(one, heads) for one in words.heads_norms(layout))
        return (*map(_block, found), *inside)


def _block(one: FfnLinear, heads: str = "") -> FfnBlock:
    return FfnBlock(one.slot.name.removesuffix(".weight"), (one,), heads=heads)
