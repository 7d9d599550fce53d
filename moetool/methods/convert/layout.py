"""convert-layout: the experts of a MoE checkpoint as single tensors, or stacked. Only bytes move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.methods.contract import (
    Builder,
    Certificate,
    Decisions,
    Line,
    Made,
    Method,
    ModelFacts,
    Settings,
    Summary,
)
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.surgery import reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.layout import Layout
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import Piece, Stored, whole
from moetool.surgery.text_model import text_model

MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class Converting:
    """The options of convert-layout."""

    to: str = option(
        "per-expert",
        "per-expert (what most loaders read) or fused (stacked, transformers 5)",
        WHAT,
        choices=("per-expert", "fused"),
    )


class ConvertLayout(Method):
    """Write the same experts as single tensors, or stacked; only bytes move.

    Forms and which loader reads them: Megatron-Bridge 4706, mergekit 0.1.5 and transformers'
    conversion_mapping.
    """

    Options = Converting
    examples = (
        "moetool convert-layout my-moe stacked --to fused",
        "moetool convert-layout stacked single --to per-expert",
        "moetool convert-layout my-moe stacked --to fused --dry-run",
    )
    options: Converting

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Nothing to decide."""
        return Decisions()

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """Expert tensors in the other form, all others as they are."""
        (source,) = sources
        experts = PlainExperts.of(source)
        layer_of: dict[str, int] = {}
        for number in experts.layers:
            layer_of |= dict.fromkeys((s.name for s in experts.tensors(number)), number)
        if not layer_of:
            raise MoetoolError(
                "no experts found where the layout has them",
                file=source.folder,
                expected=f"experts of {experts.layout.model_type}",
                hint="`moetool inspect` says what is there",
            )
        build, done = Builder(), set()
        for name in sorted(source.tensors):
            stored, layer = source.tensors[name], layer_of.get(name)
            if layer is None:
                build.copy(whole(stored), whole(build.target(name, stored.dtype, stored.shape)))
            elif layer not in done:
                done.add(layer)
                self._write(build, experts, layer)
        wanted = Outputs(source.config, build.targets, build.tasks, {})
        plan = reform.plan([source], wanted, max_shard=settings.max_shard)
        certificate = Certificate("exact", "only names and places change")
        return Made(plan, certificate, plan.config, {}, self._facts(experts, plan))

    def _facts(self, experts: PlainExperts, plan: Plan) -> ModelFacts:
        first = experts.pieces(experts.layers[0], 0)
        size = sum(p.count for p in first.values())
        top_k = experts.layout.field("top_k", experts.config)
        idle = (
            len(experts.layers)
            * size
            * (experts.count - min(top_k or experts.count, experts.count))
        )
        return ModelFacts(
            source_type=experts.layout.model_type,
            target_type=experts.layout.model_type,
            layers=experts.layers,
            experts=experts.count,
            top_k=top_k,
            expert_width=first["down"].shape[1],
            layout=self.options.to,
            parameters=plan.parameters,
            active_parameters=plan.parameters - idle,
        )

    def _write(self, build: Builder, experts: PlainExperts, layer: int) -> None:
        if self.options.to == "per-expert":
            _write_single(build, experts, layer)
        else:
            _write_stacked(build, experts, layer)

    def lines(self, summary: Summary) -> list[Line]:
        """The family, the experts, and how many parameters run."""
        return ModelFacts.of(summary.facts).lines()


def _write_single(build: Builder, experts: PlainExperts, layer: int) -> None:
    layout = experts.layout
    names = layout.per_expert()
    if not (names and layout.experts.reads_per_expert):
        raise MoetoolError(
            f"{layout.model_type} reads stacked experts only: per-expert names would load as random experts",
            hint="leave it as it is",
        )
    dtype = experts.dtype(layer)
    for expert in range(experts.count):
        pieces = experts.pieces(layer, expert)
        for matrix in MATRICES:
            name = experts.named(names[matrix], layer, expert)
            target = build.target(name, dtype, pieces[matrix].shape)
            build.copy(pieces[matrix], whole(target))


def _write_stacked(build: Builder, experts: PlainExperts, layer: int) -> None:
    names, dtype, count = experts.layout.fused(), experts.dtype(layer), experts.count
    width, hidden = experts.pieces(layer, 0)["gate"].shape
    both = build.target(experts.named(names["gate_up"], layer), dtype, (count, 2 * width, hidden))
    down = build.target(experts.named(names["down"], layer), dtype, (count, hidden, width))
    slab = width * hidden
    for expert in range(count):
        piece = experts.pieces(layer, expert)
        build.copy(piece["gate"], Piece(both.name, (width, hidden), 2 * expert * slab))
        build.copy(piece["up"], Piece(both.name, (width, hidden), (2 * expert + 1) * slab))
        build.copy(piece["down"], Piece(down.name, (hidden, width), expert * slab))


@dataclass(frozen=True)
class PlainExperts:
    """The experts of a checkpoint, wherever they lie."""

    source: Checkpoint
    layout: Layout
    config: JsonObject
    prefix: str
    stacked: bool

    @classmethod
    def of(cls, source: Checkpoint) -> PlainExperts:
        """Refuses what has no experts, or none with a second form that is plain bytes."""
        at = text_model(source.config)
        if at.layout.kind != "moe":
            raise MoetoolError(
                f"{at.layout.model_type} has no experts",
                file=source.folder,
                hint="`moetool upcycle` makes them",
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
        return cls(source, at.layout, at.config, at.prefix, stacked)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that hold experts."""
        return tuple(sorted(self.layout.moe_layers(self.config)))

    @property
    def count(self) -> int:
        """PlainExperts of a layer."""
        return int(self.layout.field("experts", self.config) or 0)

    def named(self, template: str, layer: int, expert: int = 0) -> str:
        """A tensor's full name."""
        filled = template.replace("{layer}", str(layer)).replace("{expert}", str(expert))
        return self.prefix + filled

    def tensors(self, layer: int) -> list[Stored]:
        """All stored tensors of a layer's experts."""
        templates = (self.layout.fused() if self.stacked else self.layout.per_expert()).values()
        names: set[str] = set()
        for expert in range(self.count):
            names |= {self.named(template, layer, expert) for template in templates}
        return [self.source.tensor(n) for n in sorted(names)]

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
