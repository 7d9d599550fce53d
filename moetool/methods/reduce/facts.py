"""What the report says of a reduced model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import TYPE_CHECKING

from moetool.data import JsonMapping, JsonObject
from moetool.methods.reduce.decided import Decided
from moetool.methods.reduce.protect import Peak
from moetool.surgery.experts import Mixture
from moetool.surgery.groups import MODEL_TYPE
from moetool.surgery.plan import Plan

if TYPE_CHECKING:
    from moetool.methods.reduce.writing import Planned, Writing


TEXT = "text"  # what of a refit is text, beside the names of forward/drawn.py


@dataclass(frozen=True)
class Refitted:
    """Relative squared error of a layer's output, before and after its down matrices were solved.
    `few`: experts that saw fewer tokens than they are wide, and were held near what they were;
    `left_out`: the same two errors on tokens that were not solved on, of the text and of what
    stands for all other text (reduce/left_out.py).
    """

    before: float
    after: float
    few: int = 0
    left_out: Mapping[str, list[float]] = field(default_factory=dict)

    def as_json(self) -> JsonObject:
        apart = {k: {"before": b, "after": a} for k, (b, a) in self.left_out.items()}
        found = {"error_before": self.before, "error_after": self.after, "few": self.few}
        return found | ({"left_out": apart} if apart else {})


@dataclass(frozen=True)
class TextSeen:
    """The text that decided."""

    tokens: int
    files: list[JsonObject]
    data_sha256: str
    seq_len: int

    def share(self, drawn: str) -> float:
        """The share of the tokens that are no text but `drawn` so (forward/drawn.py)."""
        found = sum(file["tokens"] for file in self.files if file.get("drawn") == drawn)
        return float(found / max(1, self.tokens))

    def as_json(self) -> JsonObject:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Found:
    """What deciding found out beside the decisions. None, or empty: it was not looked for."""

    warnings: tuple[str, ...] = ()
    data: TextSeen | None = None
    protected: Mapping[int, list[int]] | None = None  # super experts by layer
    peaks: tuple[Peak, ...] = ()  # super experts, or the one whose output was the largest
    tokens_per_expert: Mapping[int, list[int]] = field(default_factory=dict)
    refit: Mapping[int, Refitted] = field(default_factory=dict)
    refit_tokens: int = 0  # the layers were solved on so many
    refit_work: float = 0.0  # of it and its walk, in units of the walk that decided
    refit_files: list[JsonObject] = field(default_factory=list)  # what they were, as in `data`
    unsolved: str = ""  # why nothing was
    replayed: str = ""  # the file of decisions
    decisions_written: str = ""

    @property
    def left_out(self) -> dict[str, tuple[float, float]]:
        """{what: (before, after)}: a layer's squared error on what no refit was solved on, means
        over the layers.
        """
        kinds = dict.fromkeys(chain.from_iterable(one.left_out for one in self.refit.values()))
        found = {}
        for kind in kinds:
            rows = [one.left_out[kind] for one in self.refit.values() if kind in one.left_out]
            before, after = (sum(part) / len(rows) for part in zip(*rows, strict=True))
            found[kind] = (before, after)
        return found

    def as_json(self) -> JsonObject:
        """Only what there is."""
        found = {
            "data": self.data.as_json() if self.data else None,
            "protected": None
            if self.protected is None
            else {str(n): e for n, e in self.protected.items()},
            "largest_outputs": [peak.as_json() for peak in self.peaks] or None,
            "tokens_per_expert": {str(n): t for n, t in self.tokens_per_expert.items()} or None,
            "refit": {str(n): r.as_json() for n, r in self.refit.items()} or None,
            "refit_tokens": self.refit_tokens or None,
            "refit_work": float(f"{self.refit_work:.3g}") or None,
            "refit_files": self.refit_files or None,
            "not_refit": self.unsolved or None,
            "replayed": self.replayed or None,
            "decisions_written": self.decisions_written or None,
        }
        return {k: v for k, v in found.items() if v is not None}


@dataclass(frozen=True)
class Sizes:
    """What a plan makes of a model, in parameters and bytes."""

    parameters: int
    active_parameters: int
    input_bytes: int
    expert_bytes_before: int
    expert_bytes_after: int


@dataclass(frozen=True)
class Reduced:
    """The facts of prune and merge. `own` is what the way alone says (moetool's report has one flat
    object; JSON keys are in `as_json`).
    """

    model_type: str
    layers: tuple[int, ...]
    top_k: int
    expert_width: int | None
    layout: str  # per-expert | fused
    counts: str  # how layers with other numbers of experts were written, or the form of the experts
    sizes: Sizes
    experts_before: int
    experts_after: int | list[int]
    removed_share: float
    decided: Decided
    found: Found
    own: JsonMapping = field(default_factory=dict)

    @property
    def target_type(self) -> str:
        return MODEL_TYPE if self.counts == "ragged" else self.model_type

    @property
    def experts(self) -> int | list[int]:
        return self.experts_after

    @property
    def parameters(self) -> int:
        return self.sizes.parameters

    @property
    def active_parameters(self) -> int:
        return self.sizes.active_parameters

    def as_json(self) -> JsonObject:
        return {
            "source_type": self.model_type,
            "target_type": self.target_type,
            "layers": list(self.layers),
            "top_k": self.top_k,
            "expert_width": self.expert_width,
            "layout": self.layout,
            "counts": self.counts,
            "experts": self.experts_after,
            **{f.name: getattr(self.sizes, f.name) for f in fields(self.sizes)},
            "reduction": self.decided.verb,
            "method_used": self.decided.method,
            "experts_before": self.experts_before,
            "experts_after": self.experts_after,
            "removed_share": self.removed_share,
            **self.own,
            **self.found.as_json(),
            "decisions": self.decided.as_json(),
        }


def of(writing: Writing, written: Planned, found: Found, own: JsonMapping) -> Reduced:
    """The facts of a planned model."""
    mixture, decided = writing.mixture, writing.decided
    layers = [decided.layers[n] for n in mixture.layers]
    counts = sorted({decision.count for decision in layers})
    kept = sum(decision.count for decision in layers)
    return Reduced(
        model_type=mixture.layout.model_type,
        layers=mixture.layers,
        top_k=mixture.top_k,
        expert_width=mixture.width(mixture.layers[0]) if mixture.plain else None,
        layout=storage(mixture),
        counts=written.counts,
        sizes=sizes(mixture, written.plan),
        experts_before=mixture.experts,
        experts_after=counts[0] if len(counts) == 1 else counts,
        removed_share=1.0 - kept / (mixture.experts * len(layers)),
        decided=decided,
        found=found,
        own=own,
    )


def storage(mixture: Mixture) -> str:
    """How experts lie: per-expert or fused."""
    single = any(c.expert is not None for c in mixture.counted.values() if c.kind == "expert")
    return "per-expert" if single else "fused"


def sizes(mixture: Mixture, plan: Plan) -> Sizes:
    """What a plan makes of a model."""
    counted = mixture.counted
    others = {n for n in mixture.source.tensors if n not in counted or counted[n].kind != "expert"}
    return Sizes(
        parameters=plan.parameters,
        active_parameters=plan.active_parameters,
        input_bytes=sum(size for size, _ in mixture.source.files.values()),
        expert_bytes_before=mixture.expert_bytes(),
        expert_bytes_after=sum(t.size for n, t in plan.targets.items() if n not in others),
    )
