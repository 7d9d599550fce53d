"""The linears of a layer, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moetool.errors import MoetoolError, did_you_mean
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import LINEAR, Group, linear_of
from moetool.surgery.layout import Layout
from moetool.surgery.places import words
from moetool.surgery.places.place import GroupPlace


class LinearPlace(GroupPlace):
    """every linear of its attention and FFN, each with a router of its own"""

    name = noun = LINEAR

    def blocks(self, layout: Layout) -> tuple[FfnBlock, ...]:
        found = (*words.linears(layout, "attention"), *FfnBlock.of(layout).linears)
        # what is added to a linear has no bias of its own
        alone = (replace(one, bias=None, whole=True) for one in found)
        return tuple(FfnBlock(one.slot.name.removesuffix(".weight"), (one,)) for one in alone)

    def of(self, layout: Layout, group: Group) -> tuple[FfnBlock, ...]:
        return chosen(self.blocks(layout), group.params.get("linears", ()))


def chosen(blocks: tuple[FfnBlock, ...], names: Sequence[str]) -> tuple[FfnBlock, ...]:
    """Those with these names, all where none is said. MoetoolError for a name that none has."""
    known = [linear_of(block.linears[0].slot.name) for block in blocks]
    for name in names:
        if name not in known:
            raise MoetoolError(
                f"a layer has no linear {name!r}",
                expected=f"some of {', '.join(dict.fromkeys(known))}",
                found=", ".join(map(str, names))[:200],
                hint=did_you_mean(str(name), known),
            )
    named = zip(known, blocks, strict=True)
    return tuple(block for name, block in named if not names or name in names)
