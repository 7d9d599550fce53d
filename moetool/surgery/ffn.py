"""Where the FFN of a family's layers lies, found by the roles in its layout, and what groups of
experts add to that layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from moetool.errors import MoetoolError
from moetool.surgery.family import GroupSlot, Slot
from moetool.surgery.groups import MODEL_TYPE, Group, block_of, linear_of
from moetool.surgery.inside import inside
from moetool.surgery.layout import Layout

ROLES = ("gate", "up", "gate_up", "fc1", "down", "fc2")
LAST = ("down", "fc2")  # those that give the FFN's output
_WEIGHT = ".weight"


@dataclass(frozen=True)
class FfnLinear:
    """One linear of an FFN. `transposed`: its weight lies as [in, out]; `bias`: the slot of its
    bias, where the family has one.
    """

    role: str
    slot: Slot
    bias: Slot | None
    transposed: bool

    @property
    def name(self) -> str:
        """Its name inside the block: `gate_proj`."""
        return linear_of(self.slot.name)

    def sides(self, shape: Sequence[int]) -> tuple[int, int]:
        """(out, in) of a weight of this shape."""
        first, second = shape
        return (second, first) if self.transposed else (first, second)


@dataclass(frozen=True)
class FfnBlock:
    """The FFN of a layer. `module`: the template of the module that holds its linears."""

    module: str
    linears: tuple[FfnLinear, ...]

    @classmethod
    def of(cls, layout: Layout) -> FfnBlock:
        """By the layout's roles. MoetoolError where there is none, no one module holds it, or
        nothing could run experts in it (modeling/install).
        """
        found = [s for role in ROLES if (s := layout.role(f"ffn.{role}")) is not None]
        roles = {str(s.role).removeprefix("ffn.") for s in found}
        if layout.kind != "dense" or not roles.intersection(LAST) or len(roles) < 2:
            have = "it has experts already" if layout.kind == "moe" else f"roles {sorted(roles)}"
            raise _homeless(layout, "an FFN whose linears the layout names", have)
        if not layout.stack:
            raise _homeless(layout, "a plain stack of layers", "none that the layout names")
        if layout.overlay.adds_residual:
            raise _homeless(layout, "an FFN of its input alone", "one that adds the residual too")
        modules = sorted({block_of(s.name) for s in found})
        bare = modules[0].endswith("{layer}")  # the linears lie in the layer itself
        if len(modules) > 1 or "{i" in modules[0] or bare:
            raise _homeless(layout, "one module with all linears of the FFN", ", ".join(modules))
        slots = {s.name: s for s in layout.tensors}
        turned = layout.overlay.linears == "transposed"

        def linear(slot: Slot) -> FfnLinear:
            bias = slots.get(slot.name.removesuffix(_WEIGHT) + ".bias")
            return FfnLinear(str(slot.role).removeprefix("ffn."), slot, bias, turned)

        return cls(modules[0], tuple(map(linear, found)))

    @property
    def last(self) -> FfnLinear:
        """The linear that gives the output."""
        return next(one for one in self.linears if one.role in LAST)


def _homeless(layout: Layout, expected: str, found: str) -> MoetoolError:
    return MoetoolError(
        f"{layout.model_type} has no FFN that groups of experts can stand beside",
        expected=expected,
        found=found,
        hint=f"see `moetool archs show {layout.model_type}`",
    )


def grown(layout: Layout, groups: Sequence[Group], count: int) -> Layout:
    """The layout of a family with these groups, for a config of `count` layers: every matrix of an
    expert has a slot, in whatever form it is stored. MoetoolError for a group that has no place.
    """
    block = FfnBlock.of(layout)
    for group in groups:
        _check(group, count)
    gone = set(chain.from_iterable(g.layers for g in groups if g.base == "gone"))
    kept = _without(layout.tensors, block, set(range(count)) - gone) if gone else layout.tensors
    more = chain.from_iterable(_slots(layout, block, group) for group in groups)
    cls = f"Moe{layout.cls}"
    return replace(layout, model_type=MODEL_TYPE, cls=cls, tensors=(*kept, *more))


def _check(group: Group, count: int) -> None:
    if any(n >= count for n in group.layers):
        raise MoetoolError(
            "a group of experts in a layer that is not there",
            file="config.json",
            expected=f"layers 0 to {count - 1}",
            found=list(group.layers),
            hint="restore the config.json that came with the model",
        )


def _without(slots: Sequence[Slot], block: FfnBlock, kept: set[int]) -> tuple[Slot, ...]:
    """The family's slots, the FFN's in the layers that keep it alone."""
    biases = {one.bias.name for one in block.linears if one.bias}
    own = {one.slot.name for one in block.linears} | biases
    held = dict.fromkeys(sorted(kept), 1)
    inside = (_in(s, held) if s.name in own else s for s in slots)
    return tuple(inside)


def _in(slot: Slot, held: Mapping[int, int]) -> Slot:
    """The slot in these layers alone; where it may be missing anyway, as it is."""
    if slot.layers == "some":
        return slot
    return GroupSlot(slot.name, slot.shape, slot.role, "held", slot.when, held=held)


def _slots(layout: Layout, block: FfnBlock, group: Group) -> Iterator[GroupSlot]:
    """What one group adds: its router, and a matrix for each linear of each expert."""
    routed, held = dict.fromkeys(group.layers, 1), dict.fromkeys(group.layers, group.experts)
    rows, router = str(group.rows), f"{block.module}.{group.router}"
    hidden = layout.fields["hidden"]
    if group.rows:
        yield GroupSlot(f"{router}.weight", [rows, hidden], "router", "held", held=routed)
    if group.route.bias:
        yield GroupSlot(f"{router}.bias", [rows], "router.bias", "held", held=routed)
    expert = f"{block.module}.{group.name}.{{expert}}"
    if group.params.get("output_scale"):
        yield GroupSlot(f"{expert}.output_scale", ["1"], "expert.output_scale", "held", held=held)
    for one in inside(group.form):
        shape = [hidden if w == "hidden" else str(group.params.get(w)) for w in one.shape]
        role = f"expert.{one.name.replace('.', '_')}"
        yield GroupSlot(f"{expert}.{one.name}", [*shape], role, "held", held=held)
    for linear in block.linears:
        if not group.has(linear.name):
            continue
        role = f"expert.{linear.role}"
        name = f"{expert}.{linear.name}"
        yield GroupSlot(f"{name}.weight", linear.slot.shape, role, "held", held=held)
        if linear.bias is not None and group.base != "under":
            bias = linear.bias
            when = bias.when
            yield GroupSlot(f"{name}.bias", bias.shape, f"{role}_bias", "held", when, held=held)


def experts_in(layout: Layout, name: str) -> Mapping[int, int]:
    """Layer -> experts that groups have there under the name of this slot."""
    found: dict[int, int] = {}
    for slot in layout.tensors:
        if slot.name == name and isinstance(slot, GroupSlot):
            found |= slot.held
    return found
