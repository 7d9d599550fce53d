"""convert-layout: the experts of a MoE checkpoint as single tensors, or stacked; a model of a class
of the Hub as one of transformers. Only bytes move.
"""

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
from moetool.surgery import groups, reform, shim
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.plain_experts import PlainExperts
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import Piece, Stored, whole

MATRICES = ("gate", "up", "down")
STOCK = "stock"


@dataclass(frozen=True)
class Converting(Served):
    """The options of convert-layout."""

    to: str = option(
        "per-expert",
        "per-expert (what most loaders read), fused (stacked, transformers 5), stock (a model of a "
        "class of the Hub, such as InternLM2, by the names of the class of transformers that "
        "computes the same), or auto: what works in the clients of --for, else in most",
        WHAT,
        choices=("auto", *LAYOUTS, STOCK),
    )


class ConvertLayout(Method):
    """Write the same experts as single tensors, or stacked, or a model of a class of the Hub as one
    of transformers; only bytes move.

    Forms and which loader reads them: Megatron-Bridge 4706, mergekit 0.1.5 and transformers'
    conversion_mapping.
    """

    Options = Converting
    examples = (
        "moetool convert-layout my-moe stacked --to fused",
        "moetool convert-layout stacked single --to per-expert",
        "moetool convert-layout stacked single --to auto --for transformers4,vllm",
        "moetool convert-layout my-moe stacked --to fused --dry-run",
        "moetool convert-layout INTERNLM2 llama --to stock",
    )
    options: Converting
    lays = True

    @property
    def takes_out(self) -> bool:  # type: ignore[override]
        """Whether it writes a language model that is inside another."""
        return self.options.to == STOCK

    @property
    def reads_groups(self) -> bool:  # type: ignore[override]
        """Whether SRC may have groups: a class of the Hub may be one of moetool's own."""
        return self.options.to == STOCK

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Nothing to decide."""
        return Decisions()

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """Expert tensors in the other form, all others as they are."""
        (source,) = sources
        if self._is_renamed(source):
            return _as_stock(source, settings)
        experts, to = PlainExperts.of(source), self._to(source)
        build = laid(experts, to, lambda stored: stored.dtype)
        wanted = Outputs(source.config, build.targets, build.tasks, {})
        plan = reform.plan([source], wanted, max_shard=settings.max_shard)
        lost = sorted(set(source.told) - plan.stored_as)
        warnings = [f"{n} matrices cannot be cut like this: all are written in full" for n in lost]
        certificate = Certificate("exact", "only names and places change")
        return Made(plan, certificate, plan.config, {}, _facts(experts, to, plan), tuple(warnings))

    def _is_renamed(self, source: Checkpoint) -> bool:
        """Whether it is written by the names of its class in transformers. MoetoolError where that
        is asked for and nothing would change, and where that alone can be asked for.
        """
        asked, cls = self.options.to, source.hub_class
        if (asked == STOCK and not cls) or (cls and asked in LAYOUTS):
            raise MoetoolError(
                f"its files are of {cls}, and have no experts that lie in two ways"
                if cls
                else "its files have the names of its class already",
                file=source.folder,
                expected=f"--to {STOCK}" if cls else "a model of a class of the Hub",
                found=f"--to {asked}",
                hint="`moetool inspect` says what is there",
            )
        return bool(cls)

    def _to(self, source: Checkpoint) -> str:
        """The layout that is written."""
        asked = self.options.to
        return asked if asked in LAYOUTS else lie.chosen(source, self.options.serves)

    def lines(self, summary: Summary) -> list[Line]:
        """The family, the experts, and how many parameters run."""
        return ModelFacts.of(summary.facts).lines()


def _as_stock(source: Checkpoint, settings: Settings) -> Made:
    """Every tensor by the name that its class in transformers has for it."""
    build, config, files = Builder(), source.config, dict[str, bytes]()
    left = dict.fromkeys(source.hub_left, "it is not of the language model")
    for name, stored in source.tensors.items():
        if name not in left:
            build.copy(whole(stored), whole(build.target(name, stored.dtype, stored.shape)))
    if groups.is_ours(config):
        config, files = config | {"auto_map": dict(shim.AUTO_MAP)}, {shim.FILE: shim.TEXT.encode()}
    plan = reform.plan(
        [source], Outputs(config, build.targets, build.tasks, left), max_shard=settings.max_shard
    )
    family, count = str(config["model_type"]), plan.parameters
    facts = ModelFacts(
        source.hub_class, family, (), 0, 0, 0, "dense", count, plan.active_parameters
    )
    certificate = Certificate("exact", f"only names and places change: {family} computes the same")
    if left:
        certificate = Certificate(
            "exact_if", "tokens are text: the language model alone is written"
        )
    return Made(plan, certificate, plan.config, {}, facts, (), files)


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
