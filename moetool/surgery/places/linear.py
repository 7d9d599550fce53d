"""The linears of a layer, each by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from moetool.errors import MoetoolError, did_you_mean
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import LINEAR, Group, linear_of
from moetool.surgery.layout import Layout
from moetool.surgery.places import words
from moetool.surgery.places.place import GroupPlace


class LinearPlace(GroupPlace):
    """every linear of its attention and, where it is no mixture, FFN, each with its own router"""

    name = noun = LINEAR

    def blocks(self, layout: Layout) -> tuple[FfnBlock, ...]:
        attention = words.block(layout, "attention", mixture=True)
        # where experts stand for the FFN already, of the attention alone
        both = (attention,) if layout.kind == "moe" else (attention, FfnBlock.of(layout))
        return tuple(chain.from_iterable(map(_each, both)))

    def of(self, layout: Layout, group: Group) -> tuple[FfnBlock, ...]:
        return chosen(self.blocks(layout), group.params.get("linears", ()))


def _each(block: FfnBlock) -> Iterator[FfnBlock]:
    """The linears of a block, each a block; what is added to one has no bias of its own."""
    for one in block.linears:
        if one.rows is not None:
            raise MoetoolError(
                "no experts stand at a linear that shares its tensor with another",
                tensor=one.slot.name,
                expected="a tensor for each linear",
                found=f"{one.rows[1]} in one",
                hint="choose another --site",
            )
        alone, name = replace(one, bias=None, whole=True), one.slot.name.removesuffix(".weight")
        yield FfnBlock(name, (alone,), ".".join(filter(None, (block.within, one.path))))


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
