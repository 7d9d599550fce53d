"""convert-layout: the experts of a MoE checkpoint as single tensors, or stacked. Only bytes move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from moetool.methods.convert import lie
from moetool.methods.convert.lie import LAYOUTS
from moetool.methods.field import WHAT
from moetool.methods.options import Served, option
from moetool.surgery import groups, reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.plain_experts import PlainExperts
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import Piece, Stored, whole

MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class Converting(Served):
    """The options of convert-layout."""

    to: str = option(
        "per-expert",
        "per-expert (what most loaders read), fused (stacked, transformers 5), or auto: what works in "
        "the clients of --for, else in most",
        WHAT,
        choices=("auto", *LAYOUTS),
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
        "moetool convert-layout stacked single --to auto --for transformers4,vllm",
        "moetool convert-layout my-moe stacked --to fused --dry-run",
    )
    options: Converting
    lays = True

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Nothing to decide."""
        return Decisions()

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """Expert tensors in the other form, all others as they are."""
        (source,) = sources
        experts, to = PlainExperts.of(source), self._to(source)
        build = laid(experts, to, lambda stored: stored.dtype)
        wanted = Outputs(source.config, build.targets, build.tasks, {})
        plan = reform.plan([source], wanted, max_shard=settings.max_shard)
        lost = sorted(set(source.told) - plan.stored_as)
        warnings = [f"{n} matrices cannot be cut like this: all are written in full" for n in lost]
        certificate = Certificate("exact", "only names and places change")
        return Made(plan, certificate, plan.config, {}, _facts(experts, to, plan), tuple(warnings))

    def _to(self, source: Checkpoint) -> str:
        """The layout that is written."""
        asked = self.options.to
        return asked if asked in LAYOUTS else lie.chosen(source, self.options.serves)

    def lines(self, summary: Summary) -> list[Line]:
        """The family, the experts, and how many parameters run."""
        return ModelFacts.of(summary.facts).lines()


def _facts(experts: PlainExperts, to: str, plan: Plan) -> ModelFacts:
    first = experts.pieces(experts.layers[0], 0)
    top_k = experts.layout.field("top_k", experts.config)
    family = groups.name_of(experts.source.config, experts.layout.model_type)
    return ModelFacts(
        source_type=family,
        target_type=family,
        layers=experts.layers,
        experts=experts.count,
        top_k=top_k,
        expert_width=first["down"].shape[1],
        layout=to,
        parameters=plan.parameters,
        active_parameters=plan.active_parameters,
    )


def laid(experts: PlainExperts, to: str, dtype_of: Callable[[Stored], str]) -> Builder:
    """Copies of all tensors, experts in a layout; `dtype_of`: how a tensor is written. MoetoolError
    where there are no experts, or the family does not read them so.
    """
    source, layer_of = experts.source, experts.layer_of
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
            build.copy(whole(stored), whole(build.target(name, dtype_of(stored), stored.shape)))
        elif layer not in done:
            done.add(layer)
            _WRITE[to](build, experts, layer, dtype_of(stored))
    return build


def _write_single(build: Builder, experts: PlainExperts, layer: int, dtype: str) -> None:
    layout = experts.layout
    names = layout.per_expert()
    if not (names and layout.experts.reads_per_expert):
        raise MoetoolError(
            f"{layout.model_type} reads stacked experts only: per-expert names would load as random experts",
            hint="leave it as it is",
        )
    for expert in range(experts.count_in(layer)):
        pieces = experts.pieces(layer, expert)
        for matrix in MATRICES:
            name = experts.named(names[matrix], layer, expert)
            target = build.target(name, dtype, pieces[matrix].shape)
            build.copy(pieces[matrix], whole(target))


def _write_stacked(build: Builder, experts: PlainExperts, layer: int, dtype: str) -> None:
    names, count = experts.layout.fused(), experts.count_in(layer)
    width, hidden = experts.pieces(layer, 0)["gate"].shape
    both = build.target(experts.named(names["gate_up"], layer), dtype, (count, 2 * width, hidden))
    down = build.target(experts.named(names["down"], layer), dtype, (count, hidden, width))
    slab = width * hidden
    for expert in range(count):
        piece = experts.pieces(layer, expert)
        build.copy(piece["gate"], Piece(both.name, (width, hidden), 2 * expert * slab))
        build.copy(piece["up"], Piece(both.name, (width, hidden), (2 * expert + 1) * slab))
        build.copy(piece["down"], Piece(down.name, (hidden, width), expert * slab))


_WRITE = {"per-expert": _write_single, "fused": _write_stacked}
