"""The FFN of a layer."""

from __future__ import annotations

from moetool.surgery.ffn import FfnBlock
from moetool.surgery.layout import Layout
from moetool.surgery.places.place import GroupPlace


class FfnPlace(GroupPlace):
    """the FFN"""

    name = "ffn"
    noun = "FFN"
    alone = False

    def blocks(self, layout: Layout) -> tuple[FfnBlock, ...]:
        return (FfnBlock.of(layout),)
