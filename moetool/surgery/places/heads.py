"""The heads of a layer's attention."""

from __future__ import annotations

from dataclasses import replace

from moetool.surgery.ffn import FfnBlock
from moetool.surgery.layout import Layout
from moetool.surgery.places import words
from moetool.surgery.places.attention import AttentionPlace
from moetool.surgery.places.place import GroupPlace


class HeadsPlace(GroupPlace):
    """the heads of its attention"""

    name = "heads"
    noun = "attention"

    def blocks(self, layout: Layout) -> tuple[FfnBlock, ...]:
        (block,) = AttentionPlace().blocks(layout)
        if len(block.linears) < 3:
            found = ", ".join(one.name for one in block.linears)
            raise words.homeless(layout, self.name, "queries in a matrix of their own", found)
        return (replace(block, linears=(block.linears[0], block.last)),)
