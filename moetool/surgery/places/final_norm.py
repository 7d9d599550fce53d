"""The norm behind the last layer."""

from __future__ import annotations

from moetool.surgery.ffn import FfnBlock
from moetool.surgery.layout import Layout
from moetool.surgery.places import words
from moetool.surgery.places.place import GroupPlace


class FinalNormPlace(GroupPlace):
    """the norm behind the last layer"""

    name = "final_norm"
    noun = "norm"
    outside = True

    def blocks(self, layout: Layout) -> tuple[FfnBlock, ...]:
        norm, beside = words.final_norm(layout)
        return (FfnBlock(norm.slot.name.removesuffix(".weight"), (norm,), beside),)
