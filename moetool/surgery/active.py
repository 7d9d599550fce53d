"""How many learned numbers work on a token: all but those of the experts that it does not reach.

`inspect` and every report count here, by the form in which a matrix is stored (`forms.count`): what
experts share (the base of factored ones) works whenever one of them does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery import forms, groups
from moetool.surgery.family import GroupSlot
from moetool.surgery.groups import FIRST_SITE, PART
from moetool.surgery.layout import Layout, Matched
from moetool.surgery.spec import Stored
from moetool.surgery.text_model import TextModel, any_text_model


@dataclass(frozen=True)
class Matching:
    """Which slot a tensor fills, in the family's own layout or in that of its text model; either
    may be unknown.
    """

    family: Layout | None
    text: TextModel | None

    @classmethod
    def of(cls, config: JsonObject, names: Iterable[str]) -> Matching:
        """For a checkpoint with this config and tensors of these names."""
        family = None
        with suppress(MoetoolError):
            family = Layout.load(groups.family_of(config))
        return cls(family, any_text_model(config, names))

    def match(self, name: str) -> Matched | None:
        """The slot; None for a name that nobody knows."""
        own = self.family.match(name) if self.family else None
        return own or (self.text.anywhere(name)[0] if self.text else None)

    def tower(self, name: str) -> str:
        """The tower with groups of its own that a tensor lies in; nothing for the text model."""
        return self.text.tower(name) if self.text else ""

    def inside(self, stored: Stored, found: Matched) -> int:
        """Learned numbers of an FFN's own matrix that a token does not reach, where experts are
        parts of the FFN.
        """
        if self.text is None or not str(found.slot.role).startswith("ffn."):
            return 0
        for group in self.text.groups:
            if group.form == PART and group.site == FIRST_SITE and found.layer in group.layers:
                parts = group.experts + int(group.params.get("shared", 0))
                return stored.elements * (group.experts - group.reached) // parts
        return 0

    @property
    def top_k(self) -> object:
        """Experts that a token reaches, where the config says it."""
        if self.text is not None and self.text.groups and self.text.layout.kind != "moe":
            reached = {group.reached for group in self.text.groups}
            return reached.pop() if len(reached) == 1 else None
        return self.text.field("top_k") if self.text else None


def idle(config: JsonObject, tensors: Mapping[str, Stored]) -> int:
    """Learned numbers of the routed experts of all layers that a token does not reach."""
    matching = Matching.of(config, tensors)
    layers: dict[tuple[str, int], RoutedLayer] = defaultdict(RoutedLayer)
    inside = 0
    for stored in tensors.values():
        found = matching.match(stored.name)
        if found is not None and found.layer is not None:
            tower = matching.tower(stored.name)
            layers[tower, found.layer].add(stored, found)
            inside += 0 if tower else matching.inside(stored, found)
    return inside + sum(layer.idle(matching.top_k) for layer in layers.values())


@dataclass
class RoutedLayer:
    """The routed experts of one layer, by group where there are such."""

    groups: dict[str, Routed] = field(default_factory=dict)

    def add(self, stored: Stored, found: Matched) -> None:
        """Take a tensor of the layer in, where it belongs to an expert or is a stack of them."""
        slot = found.slot
        owner, reached = (slot.owner, slot.reached) if isinstance(slot, GroupSlot) else ("", None)
        if str(slot.role).startswith("expert."):
            self.groups.setdefault(owner, Routed(reached)).add(stored, found)

    @property
    def count(self) -> int:
        """Experts that the layer holds."""
        return sum(group.count for group in self.groups.values())

    @property
    def stacked(self) -> int:
        """Experts of a stacked tensor."""
        return sum(group.stacked for group in self.groups.values())

    def idle(self, top_k: object) -> int:
        """Learned numbers of the experts that a token does not reach."""
        return sum(group.idle(top_k) for group in self.groups.values())


@dataclass
class Routed:
    """The routed experts of one layer, or of one group of it, tensor by tensor. `reached`: those
    that work on a token, where the group says it.
    """

    reached: int | None = None
    tensors: list[Stored] = field(default_factory=list)
    numbers: set[int] = field(default_factory=set)  # of experts with tensors of their own
    stacked: int = 0  # experts of a stacked tensor

    @property
    def count(self) -> int:
        """Experts that the layer holds."""
        return len(self.numbers) or self.stacked

    def add(self, stored: Stored, found: Matched) -> None:
        """Take a tensor of an expert, or a stack of them, in."""
        self.tensors.append(stored)
        if found.expert is not None:
            self.numbers.add(found.expert)
        elif found.slot.role in ("expert.down", "expert.gate_up"):
            self.stacked = (stored.shape or (0,))[0]

    def idle(self, top_k: object) -> int:
        """Learned numbers of the experts that a token does not reach."""
        top_k = top_k if self.reached is None else self.reached
        if not self.count or not isinstance(top_k, int):
            return 0
        return _apart(self.tensors) * (self.count - min(top_k, self.count)) // self.count


def _apart(tensors: Iterable[Stored]) -> int:
    """Learned numbers of all these tensors, but for parts that several of them share."""
    sizes: dict[str, int] = {}
    holders: Counter[str] = Counter()
    for tensor in tensors:
        held = forms.weights(tensor)
        sizes |= held
        holders.update(held.keys())
    return sum(size for part, size in sizes.items() if holders[part] == 1)
