"""Experts whose matrices are plain bytes in both layouts: single, or stacked with gate over up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery import groups
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.layout import Layout
from moetool.surgery.spec import Piece, Stored, whole
from moetool.surgery.text_model import text_model


@dataclass(frozen=True)
class PlainExperts:
    """The experts of a checkpoint, wherever they lie."""

    source: Checkpoint
    layout: Layout
    config: JsonObject
    prefix: str
    stacked: bool
    own: Mapping[int, int] = field(default_factory=dict)  # of layers with another number of them

    @classmethod
    def of(cls, source: Checkpoint) -> PlainExperts:
        """Refuses what has no experts, or none with a second form that is plain bytes."""
        at = text_model(source.config)
        if at.layout.kind != "moe":
            raise MoetoolError(
                f"{at.layout.model_type} has no experts",
                file=source.folder,
                hint="`moetool inspect` says what is there",
            )
        if not at.layout.fused():
            raise MoetoolError(
                f"the experts of {at.layout.model_type} have no second form that is plain bytes",
                expected="stacked as [experts, gate above up, hidden]",
                hint=at.layout.overlay.note
                or "they are transposed, interleaved or stored in one way only",
            )
        head, _, tail = at.layout.fused()["gate_up"].partition("{layer}")
        stacked = any(n.startswith(at.prefix + head) and n.endswith(tail) for n in source.tensors)
        own = at.own_counts() if groups.is_ragged(source.config) else {}
        return cls(source, at.layout, at.config, at.prefix, stacked, own)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that hold experts."""
        return tuple(sorted(self.layout.moe_layers(self.config)))

    @property
    def count(self) -> int:
        """Experts of a layer, where the config says no other number for it."""
        return int(self.layout.field("experts", self.config) or 0)

    def count_in(self, layer: int) -> int:
        """Experts of this layer."""
        return self.own.get(layer, self.count)

    def named(self, template: str, layer: int, expert: int = 0) -> str:
        """A tensor's full name."""
        filled = template.replace("{layer}", str(layer)).replace("{expert}", str(expert))
        return self.prefix + filled

    def tensors(self, layer: int) -> list[Stored]:
        """All stored tensors of a layer's experts."""
        templates = (self.layout.fused() if self.stacked else self.layout.per_expert()).values()
        names: set[str] = set()
        for expert in range(self.count_in(layer)):
            names |= {self.named(template, layer, expert) for template in templates}
        return [self.source.tensor(n) for n in sorted(names)]

    @property
    def layer_of(self) -> dict[str, int]:
        """The layer of each stored tensor of experts, by name."""
        found: dict[str, int] = {}
        for number in self.layers:
            found |= dict.fromkeys((s.name for s in self.tensors(number)), number)
        return found

    def dtype(self, layer: int) -> str:
        """How a layer's experts are stored."""
        return self.source.tensors[self.pieces(layer, 0)["gate"].name].dtype

    def pieces(self, layer: int, expert: int) -> dict[str, Piece]:
        """gate, up and down of one expert."""
        if not self.stacked:
            return {
                m: whole(self.source.tensor(self.named(t, layer, expert)))
                for m, t in self.layout.per_expert().items()
            }
        names = self.layout.fused()
        both, down = (self.source.tensor(self.named(names[r], layer)) for r in ("gate_up", "down"))
        count, double, hidden = both.shape
        if expert >= count:
            raise MoetoolError(
                "the config has more experts than the file",
                file=self.source.folder,
                tensor=both.name,
                expected=expert + 1,
                found=count,
                hint="correct the config",
            )
        width, slab = double // 2, double * hidden
        return {
            "gate": Piece(both.name, (width, hidden), expert * slab),
            "up": Piece(both.name, (width, hidden), expert * slab + width * hidden),
            "down": Piece(down.name, down.shape[1:], expert * down.shape[1] * down.shape[2]),
        }
