"""The attention of a layer, whole."""

from __future__ import annotations

from moetool.surgery.ffn import FfnBlock
from moetool.surgery.layout import Layout
from moetool.surgery.places import words
from moetool.surgery.places.place import GroupPlace


class AttentionPlace(GroupPlace):
    """its attention"""

    name = noun = "attention"
    alone = False

    def blocks(self, layout: Layout) -> tuple[FfnBlock, ...]:
        return (words.block(layout, self.name),)
