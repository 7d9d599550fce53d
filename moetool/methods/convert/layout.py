"""convert-layout: the experts of a MoE checkpoint as single tensors, or stacked. Only bytes move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Builder, Certificate, Decisions, Made, Settings
from moetool.surgery import reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.layout import Layout, text_model
from moetool.surgery.reform import Wanted
from moetool.surgery.spec import Piece, Stored, whole

MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class ConvertLayout:
    """Write a mixture of experts with per-expert or with stacked (fused) expert tensors; every
    byte stays the same.

    Forms and which loader reads them: Megatron-Bridge 4706, mergekit 0.1.5 and transformers'
    conversion_mapping.
    """

    to: str = field(
        default="per-expert",
        metadata={"help": "per-expert (what most loaders read) or fused (stacked, transformers 5)"},
    )

    def __post_init__(self) -> None:
        if self.to not in ("per-expert", "fused"):
            raise UsageError(
                f"--to {self.to!r} is not known",
                expected="per-expert or fused",
                hint="for example --to per-expert",
            )

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Nothing to decide."""
        return Decisions()

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """Expert tensors in the other form, all others as they are."""
        (source,) = sources
        layout, config, prefix = _experts_of(source)
        build = Builder()
        experts = layout.field("experts", config)
        stacked = _stacked(source, layout, prefix)
        moved = {
            t.name
            for layer in layout.moe_layers(config)
            for t in _expert_tensors(source, layout, prefix, layer, experts, stacked)
        }
        if not moved:
            raise MoetoolError(
                "no experts found where the layout has them",
                file=source.folder,
                expected=f"experts of {layout.model_type}",
                hint="`moetool inspect` says what is there",
            )
        done: set[int] = set()
        for name in sorted(source.tensors):
            stored = source.tensors[name]
            if name not in moved:
                build.copy(whole(stored), whole(build.target(name, stored.dtype, stored.shape)))
                continue
            found = _number(name)
            if found not in done:
                done.add(found)
                self._layer(build, source, layout, prefix, found, experts, stacked)
        plan = reform.plan(
            [source],
            Wanted(source.config, build.targets, build.tasks, {}),
            max_shard=settings.max_shard,
        )
        expert = sum(
            p.count
            for p in _pieces(
                source, layout, prefix, min(layout.moe_layers(config)), 0, stacked
            ).values()
        )
        top_k = layout.field("top_k", config)
        idle = len(layout.moe_layers(config)) * expert * (experts - min(top_k or experts, experts))
        facts = {
            "source_type": layout.model_type,
            "target_type": layout.model_type,
            "layers": sorted(layout.moe_layers(config)),
            "experts": experts,
            "top_k": top_k,
            "expert_width": _pieces(
                source, layout, prefix, min(layout.moe_layers(config)), 0, stacked
            )["down"].shape[1],
            "layout": self.to,
            "parameters": plan.parameters,
            "active_parameters": plan.parameters - idle,
            "expert_sources": [],
        }
        return Made(
            plan, Certificate("exact", "only names and places change"), plan.config, {}, facts
        )

    def _layer(
        self,
        build: Builder,
        source: Checkpoint,
        layout: Layout,
        prefix: str,
        layer: int,
        experts: int,
        stacked: bool,
    ) -> None:
        pieces = [_pieces(source, layout, prefix, layer, e, stacked) for e in range(experts)]
        dtype = source.tensors[pieces[0]["gate"].name].dtype
        if self.to == "per-expert":
            names = layout.per_expert()
            if not (names and layout.experts.reads_per_expert):
                raise MoetoolError(
                    f"{layout.model_type} reads stacked experts only: per-expert names would load as random experts",
                    hint="leave it as it is",
                )
            for expert, piece in enumerate(pieces):
                for matrix in MATRICES:
                    target = build.target(
                        prefix
                        + names[matrix]
                        .replace("{layer}", str(layer))
                        .replace("{expert}", str(expert)),
                        dtype,
                        piece[matrix].shape,
                    )
                    build.copy(piece[matrix], whole(target))
            return
        names = layout.fused()
        width, hidden = pieces[0]["gate"].shape
        both = build.target(
            prefix + names["gate_up"].replace("{layer}", str(layer)),
            dtype,
            (experts, 2 * width, hidden),
        )
        down = build.target(
            prefix + names["down"].replace("{layer}", str(layer)), dtype, (experts, hidden, width)
        )
        for expert, piece in enumerate(pieces):
            slab = width * hidden
            build.copy(piece["gate"], Piece(both.name, (width, hidden), 2 * expert * slab))
            build.copy(piece["up"], Piece(both.name, (width, hidden), (2 * expert + 1) * slab))
            build.copy(piece["down"], Piece(down.name, (hidden, width), expert * slab))


def _experts_of(source: Checkpoint) -> tuple[Layout, dict[str, Any], str]:
    at = text_model(source.config)
    layout, config, prefix = at.layout, at.config, at.prefix
    if layout.kind != "moe":
        raise MoetoolError(
            f"{layout.model_type} has no experts",
            file=source.folder,
            hint="`moetool upcycle` makes them",
        )
    if not layout.fused():
        raise MoetoolError(
            f"the experts of {layout.model_type} have no second form that is plain bytes",
            expected="stacked as [experts, gate above up, hidden]",
            hint=layout.overlay.note
            or "they are transposed, interleaved or stored in one way only",
        )
    return layout, config, prefix


def _stacked(source: Checkpoint, layout: Layout, prefix: str) -> bool:
    head, _, tail = layout.fused()["gate_up"].partition("{layer}")
    return any(n.startswith(prefix + head) and n.endswith(tail) for n in source.tensors)


def _number(name: str) -> int:
    return int(next(p for p in name.split(".") if p.isdigit()))


def _expert_tensors(
    source: Checkpoint, layout: Layout, prefix: str, layer: int, experts: int, stacked: bool
) -> list[Stored]:
    templates = layout.fused() if stacked else layout.per_expert()
    names = {
        prefix + t.replace("{layer}", str(layer)).replace("{expert}", str(e))
        for t in templates.values()
        for e in range(experts)
    }
    return [source.tensor(n) for n in sorted(names)]


def _pieces(
    source: Checkpoint, layout: Layout, prefix: str, layer: int, expert: int, stacked: bool
) -> dict[str, Piece]:
    """gate, up and down of one expert, wherever they lie."""
    if not stacked:
        return {
            m: whole(
                source.tensor(
                    prefix + t.replace("{layer}", str(layer)).replace("{expert}", str(expert))
                )
            )
            for m, t in layout.per_expert().items()
        }
    names = layout.fused()
    both, down = (
        source.tensor(prefix + names[r].replace("{layer}", str(layer))) for r in ("gate_up", "down")
    )
    count, double, hidden = both.shape
    if expert >= count:
        raise MoetoolError(
            "the config has more experts than the file",
            file=source.folder,
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
