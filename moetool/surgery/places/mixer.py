"""The state-space mixer of a layer."""

from __future__ import annotations

from moetool.surgery.ffn import FfnBlock
from moetool.surgery.layout import Layout
from moetool.surgery.places import words
from moetool.surgery.places.place import GroupPlace


class MixerPlace(GroupPlace):
    """its state-space mixer"""

    name = noun = "mixer"

    def blocks(self, layout: Layout) -> tuple[FfnBlock, ...]:
        return (words.block(layout, self.name),)
