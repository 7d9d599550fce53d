"""The linears of a layer, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moetool.errors import MoetoolError, did_you_mean
from moetool.surgery.ffn import FfnBlock, FfnLinear
from moetool.surgery.groups import LINEAR, Group, linear_of
from moetool.surgery.layout import Layout
from moetool.surgery.places import words
from moetool.surgery.places.place import GroupPlace


class LinearPlace(GroupPlace):
    """every linear of its attention and, where it is no mixture, FFN, each with its own router"""

    name = noun = LINEAR

    def blocks(self, layout: Layout) -> tuple[FfnBlock, ...]:
        found = (*words.linears(layout, "attention", mixture=True), *_ffn(layout))
        # what is added to a linear has no bias of its own
        alone = (replace(one, bias=None, whole=True) for one in found)
        return tuple(FfnBlock(one.slot.name.removesuffix(".weight"), (one,)) for one in alone)

    def of(self, layout: Layout, group: Group) -> tuple[FfnBlock, ...]:
        return chosen(self.blocks(layout), group.params.get("linears", ()))


def _ffn(layout: Layout) -> tuple[FfnLinear, ...]:
    """Those of the FFN; none where experts stand for it already."""
    return () if layout.kind == "moe" else FfnBlock.of(layout).linears


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
