"""What a report says of a quantized model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from moetool.data import JsonObject
from moetool.methods.contract import Line
from moetool.methods.quantize.choice import Choice
from moetool.methods.quantize.scheme import Scheme
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.forms import Spelled
from moetool.surgery.plan import Plan
from moetool.surgery.spec import Shape
from moetool.surgery.text_model import text_model
from moetool.units import show_bytes, show_count


@dataclass(frozen=True)
class RoleFacts:
    """One role: its format, how many matrices, their weights, and stored bits a weight."""

    format: str
    matrices: int
    weights: int
    bits: float


@dataclass(frozen=True)
class Quantized:
    """Facts of a quantized model."""

    source_type: str
    method: str
    loaders: tuple[str, ...]
    roles: Mapping[str, RoleFacts]
    experts_quantized: int  # matrices of routed experts
    experts_skipped: tuple[str, ...]
    left: Mapping[str, str]  # matrices that stay as they are, and why
    parameters: int
    active_parameters: int
    experts: int | None = None
    top_k: int | None = None
    expert_width: int | None = None
    solved: JsonObject = field(default_factory=dict)  # what a way that solves found on its text
    fit: JsonObject = field(default_factory=dict)  # how the formats were chosen (fit.py)

    @property
    def target_type(self) -> str:
        return self.source_type

    def as_json(self) -> JsonObject:
        """The keys that stand in the report."""
        return {
            "source_type": self.source_type,
            "target_type": self.target_type,
            "rounding": self.method,
            "loader": self.loaders[0] if len(self.loaders) == 1 else list(self.loaders),
            "roles": {k: vars(v) for k, v in self.roles.items()},
            "experts_quantized": self.experts_quantized,
            "experts_total": self.experts_total,
            "experts_skipped": list(self.experts_skipped),
            "left": dict(self.left),
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "experts": self.experts,
            "top_k": self.top_k,
            "expert_width": self.expert_width,
        } | {k: v for k, v in (("solved", self.solved), ("fit", self.fit)) if v}

    def formats(self) -> str:
        """`experts=int4/128,attn=int8/128`, of the roles that there are."""
        return ",".join(f"{role}={facts.format}" for role, facts in self.roles.items())

    @property
    def experts_total(self) -> int:
        return self.experts_quantized + len(self.experts_skipped)

    def counted(self) -> str:
        """`quantized: 768/768, skipped: 0`."""
        skipped = len(self.experts_skipped)
        names = f" ({', '.join(self.experts_skipped[:2])}, ...: report.json)" if skipped else ""
        return (
            f"quantized: {self.experts_quantized}/{self.experts_total}, skipped: {skipped}{names}"
        )

    def lines(self) -> list[Line]:
        """As the screen says them."""
        each = [
            f"{role} {r.format} ({show_count(r.weights)} at {r.bits:.3g} bits)"
            for role, r in self.roles.items()
        ]
        experts = [Line("experts", self.counted())] if self.experts_total else []
        return [
            Line("formats", ", ".join(each)),
            *experts,
            Line("left full", f"{len(self.left)} matrices; report.json names them"),
            Line("loader", ", ".join(self.loaders)),
            *(_fitted(self.fit) if self.fit else ()),
        ]


def _fitted(fit: JsonObject) -> list[Line]:
    """What each role costs in each format, and the plans that were compared."""
    unit = f"KL on {fit['tokens']:,} tokens" if fit["tokens"] else f"{fit['unit']} of weights"
    roles: dict[str, list[str]] = {}
    for row in fit["sensitivity"]:
        roles.setdefault(row["role"], []).append(f"{row['format']} {row['loss']:.3g}")
    found = [Line(role, f"{unit}: {', '.join(costs)}") for role, costs in roles.items()]
    for plan in fit["considered"]:
        size, loss = show_bytes(plan["bytes"]), f"{plan['predicted']:.3g} predicted"
        measured = f", {plan['measured']:.3g} measured" if "measured" in plan else ""
        mark = "chosen" if plan["plan"] == fit["plan"] else "plan"
        found.append(Line(mark, f"{plan['plan']}: {size}, {loss}{measured}"))
    return found


def _bits(given: Spelled, shape: Shape) -> float:
    """Stored bits of a matrix."""
    return forms.named(given.form).bits(shape, given.params) * prod(shape)


def of(
    source: Checkpoint,
    scheme: Scheme,
    choice: Choice,
    plan: Plan,
    said: tuple[str, tuple[str, ...]],
) -> Quantized:
    """The facts; `said`: the way of rounding, and who must read it."""
    at = text_model(source.config)
    roles = {}
    for role, asked in scheme.roles.items():
        mine = [m for n, m in choice.matrices.items() if m.role == role and n in choice.formats]
        if not mine:
            continue
        weights = sum(prod(m.shape) for m in mine)
        stored = sum(_bits(choice.formats[m.name], m.shape) for m in mine)
        roles[role] = RoleFacts(str(asked), len(mine), weights, round(stored / weights, 4))
    experts = [n for n, m in choice.matrices.items() if m.role == "experts"]
    mixture = Mixture.of(source) if at.layout.kind == "moe" else None
    return Quantized(
        at.layout.model_type,
        *said,
        roles,
        sum(n in choice.formats for n in experts),
        tuple(n for n in experts if n not in choice.formats),
        choice.left,
        plan.parameters,
        plan.active_parameters,
        mixture.experts if mixture else None,
        mixture.top_k if mixture else None,
        mixture.width(mixture.layers[0]) if mixture else None,
    )
