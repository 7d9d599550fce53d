"""What the report says of an extended model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from moetool.data import JsonObject
from moetool.methods.contract import Line
from moetool.methods.extend.choose import Copies
from moetool.methods.extend.cut import Extender
from moetool.methods.extend.look import Usage
from moetool.methods.reduce.facts import Sizes, TextSeen, sizes, storage
from moetool.methods.reduce.writing import Writing
from moetool.surgery.plan import Plan
from moetool.units import show_count

SHOWN = 6  # layers that are named


@dataclass(frozen=True)
class Extended:
    """The facts of extend. `copies`: {layer: experts that were copied}; `scores`: by which
    --layers auto took layers; `counts`: uniform, or ragged.
    """

    model_type: str
    target_type: str
    layers: tuple[int, ...]
    top_k: int
    expert_width: int | None
    layout: str
    counts: str
    router: str
    sizes: Sizes
    experts_before: int
    experts: int | list[int]
    copies: Mapping[int, tuple[int, ...]]
    calibration: int
    scores: Mapping[int, float] = field(default_factory=dict)
    data: TextSeen | None = None

    @property
    def parameters(self) -> int:
        return self.sizes.parameters

    @property
    def active_parameters(self) -> int:
        return self.sizes.active_parameters

    def as_json(self) -> JsonObject:
        """The keys that stand in the report; what was not looked for is left out."""
        plain = ("target_type", "top_k", "expert_width", "layout", "counts", "router")
        corrected = {"calibration": self.calibration} if self.calibration else {}
        said = {name: getattr(self, name) for name in (*plain, "experts_before", "experts")}
        seen = {
            "scores": {str(n): float(f"{s:.6g}") for n, s in sorted(self.scores.items())},
            "data": self.data.as_json() if self.data else None,
        }
        return {
            "source_type": self.model_type,
            "layers": list(self.layers),
            **said,
            **{f.name: getattr(self.sizes, f.name) for f in fields(self.sizes)},
            "copies": {str(n): list(e) for n, e in sorted(self.copies.items())},
            **corrected,
            **{k: v for k, v in seen.items() if v},
        }

    @property
    def counted(self) -> str:
        """`8 -> 9 experts in 4 of 4 layers`."""
        after = self.experts if isinstance(self.experts, int) else max(self.experts)
        where = f"{len([n for n in self.copies if n in self.layers])} of {len(self.layers)}"
        return f"{self.experts_before} -> {after} experts in {where} layers"

    def lines(self) -> list[Line]:
        """As the screen says them."""
        each = [f"{n}: {'+'.join(map(str, e))}" for n, e in sorted(self.copies.items())]
        more = f", and {len(each) - SHOWN} more" if len(each) > SHOWN else ""
        runs = f"{show_count(self.parameters)}, {show_count(self.active_parameters)} active"
        rows = "their experts' rows" if self.router == "copy" else "rows that are never chosen"
        return [
            Line("extend", f"{self.counted} of {self.model_type}"),
            Line("copied", f"experts by layer {', '.join(each[:SHOWN])}{more}; with {rows}"),
            *self._corrected(),
            Line("parameters", runs),
        ]

    def _corrected(self) -> list[Line]:
        if not self.calibration:
            return []
        said = f"{self.calibration} neurons a router correct its weights, zero at birth"
        return [Line("calibration", f"{said}: train them with the copies")]


def of(writing: Writing, copies: Copies, cutter: Extender, plan: Plan, seen: Usage) -> Extended:
    """The facts of a planned model."""
    mixture, layers = writing.mixture, writing.decided.layers
    counts = sorted({layers[n].count for n in mixture.layers})
    return Extended(
        model_type=mixture.layout.model_type,
        target_type=str(plan.config["model_type"]),
        layers=mixture.layers,
        top_k=mixture.top_k,
        expert_width=mixture.width(mixture.layers[0]) if mixture.plain else None,
        layout=storage(mixture),
        counts=cutter.uneven,
        router="never" if cutter.never else "copy",
        sizes=sizes(mixture, plan),
        experts_before=mixture.experts,
        experts=counts[0] if len(counts) == 1 else counts,
        copies=copies.layers,
        calibration=cutter.held.width if cutter.held else 0,
        scores=seen.scores,
        data=seen.evidence.data,
    )
