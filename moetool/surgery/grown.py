"""The layout of a family with groups of experts: what they add to it, and what they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from moetool.errors import MoetoolError
from moetool.surgery import places, towers
from moetool.surgery.family import GroupSlot, Slot
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import MODEL_TYPE, Group
from moetool.surgery.inside import inside, side
from moetool.surgery.layout import Layout


def grown(layout: Layout, groups: Sequence[Group], count: int) -> Layout:
    """A tower's layout with these groups, for a config of `count` layers: every matrix of an expert
    has a slot, in whatever form it is stored. MoetoolError for a group that has no place.
    """
    more = list[GroupSlot]()
    for group in groups:
        _check(group, count)
        for number, block in enumerate(places.named(group.site).of(layout, group)):
            if not group.once or not number:
                more += _router_slots(layout, block, group)
            more += _slots(layout, block, group)
    cls, kept = f"Moe{layout.cls}", without(layout, layout, groups, count)
    ours = replace(layout, model_type=MODEL_TYPE, base=layout.family, cls=cls)
    return replace(ours, tensors=(*kept, *more))


def without(layout: Layout, tower: Layout, groups: Sequence[Group], count: int) -> tuple[Slot, ...]:
    """The slots of a layout without what groups in one of its towers, of `count` layers, stand
    for.
    """
    kept = layout.tensors
    for group in groups:
        for block in places.named(group.site).of(tower, group):
            kept = _without(kept, block, group, count)
    return kept


def _check(group: Group, count: int) -> None:
    if any(n >= count for n in group.layers):
        raise MoetoolError(
            "a group of experts in a layer that is not there",
            file="config.json",
            expected=f"layers 0 to {count - 1}",
            found=list(group.layers),
            hint="restore the config.json that came with the model",
        )


def _without(
    slots: tuple[Slot, ...], block: FfnBlock, group: Group, count: int
) -> tuple[Slot, ...]:
    """The slots, without those of a block's own linears in the layers where these are gone."""
    if group.base != "gone":
        return slots
    mine = [one for one in block.linears if group.has(one.name)]
    own = {one.slot.name for one in mine} | {one.bias.name for one in mine if one.bias}
    held = dict.fromkeys(sorted(set(range(count)) - set(group.layers)), 1)
    inside = (_in(s, held) if s.name in own else s for s in slots)
    return tuple(inside)


def _in(slot: Slot, held: Mapping[int, int]) -> Slot:
    """The slot in these layers alone; where it may be missing anyway, as it is."""
    if slot.layers == "some":
        return slot
    if isinstance(slot, GroupSlot):  # another group has taken some already
        held = {layer: 1 for layer in held if layer in slot.held}
    return GroupSlot(slot.name, slot.shape, slot.role, "held", slot.when, held=held)


def _router_slots(layout: Layout, block: FfnBlock, group: Group) -> Iterator[GroupSlot]:
    """The router of one group."""
    routed = dict.fromkeys([min(group.layers)] if group.once else group.layers, 1)
    router, hidden = f"{block.module}.{group.router}", block.seen(layout.fields["hidden"])
    for tensor in group.router_tensors:
        shape = [w.replace("hidden", hidden) if hidden else _known(w) for w in tensor.shape]
        role = "router" if tensor.name == "weight" else f"router.{tensor.name}"
        yield GroupSlot(f"{router}.{tensor.name}", [*shape], role, "held", held=routed)


def _known(word: str) -> str | None:
    """A number; nothing where it is as wide as a token, and nothing says how wide that is."""
    return None if word.endswith("hidden") else word


def _slots(layout: Layout, block: FfnBlock, group: Group) -> Iterator[GroupSlot]:
    """What the experts of one group add: a matrix for each linear of each."""
    held, hidden = dict.fromkeys(group.layers, group.experts), block.seen(layout.fields["hidden"])
    alone = (tower := towers.lying(layout)) is not None and tower.single
    given = None if alone else hidden  # what one module gives, no field of its own config says
    owner, reached = f"{block.module}.{group.name}", group.reached
    slot = partial(GroupSlot, layers="held", held=held, owner=owner, reached=reached)
    expert = f"{owner}.{{expert}}"
    if group.params.get("output_scale"):
        yield slot(f"{expert}.output_scale", ["1"], "expert.output_scale")
    for one in inside(group.form, group.params):
        shape = [given if w == "hidden" else str(side(w, group.params)) for w in one.shape]
        role = f"expert.{one.name.replace('.', '_')}"
        have = dict.fromkeys(group.layers, one.among(group.experts, group.params))
        yield slot(f"{expert}.{one.name}", [*shape], role, held=have)
    for linear in block.linears:
        if not group.has(linear.name):
            continue
        role = f"expert.{linear.role}"
        name = f"{expert}.{linear.lies}".rstrip(".")
        yield slot(f"{name}.weight", linear.shape, role)
        if linear.bias is not None and group.base != "under":
            bias = linear.bias
            own = bias.shape if linear.rows is None else None
            yield slot(f"{name}.bias", own, f"{role}_bias", when=bias.when)


def experts_in(layout: Layout, name: str) -> Mapping[int, int]:
    """Layer -> experts that groups have there under the name of this slot."""
    found: dict[int, int] = {}
    for slot in layout.tensors:
        if slot.name == name and isinstance(slot, GroupSlot):
            found |= slot.held
    return found
