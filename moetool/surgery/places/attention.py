"""The attention of a layer, whole."""

from __future__ import annotations

from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import block_of
from moetool.surgery.layout import Layout
from moetool.surgery.places import words
from moetool.surgery.places.place import GroupPlace


class AttentionPlace(GroupPlace):
    """its attention"""

    name = noun = "attention"
    alone = False

    def blocks(self, layout: Layout) -> tuple[FfnBlock, ...]:
        found = words.linears(layout, self.name)
        modules = sorted({block_of(one.slot.name) for one in found})
        roles = sorted(one.role for one in found)
        if len(modules) > 1 or roles not in (["k", "o", "q", "v"], ["o", "qkv"]):
            expected = "one module with q, k, v and o, or qkv and o"
            raise words.homeless(
                layout, self.name, expected, f"{', '.join(roles)} in {', '.join(modules)}"
            )
        return (FfnBlock(modules[0], found),)
