"""What the report says of a reduced model."""

from __future__ import annotations

from typing import Any

from moetool.methods.contract import Decisions
from moetool.methods.reduce.decide import removed
from moetool.methods.reduce.decision import Decided, experts_lists, render
from moetool.surgery.experts import Mixture
from moetool.surgery.plan import Plan


def of(
    mixture: Mixture, decided: Decided, plan: Plan, layout: str, decisions: Decisions
) -> dict[str, Any]:
    """Facts for the summary, report.json and the model card."""
    layers = [decided.layers[n] for n in mixture.layers]
    per_expert = any(c.expert is not None for c in mixture.counted.values() if c.kind == "expert")
    width = (
        mixture.pieces(mixture.layers[0], 0)["down"].count
        // int(mixture.layout.field("hidden", mixture.text_model.config) or 1)
        if mixture.plain
        else None
    )
    idle = sum(
        mixture.expert_elements(n) * max(0, layer.count - mixture.top_k)
        for n, layer in zip(mixture.layers, layers, strict=True)
    )
    others = {
        n
        for n in mixture.source.tensors
        if n not in mixture.counted or mixture.counted[n].kind != "expert"
    }
    expert = sum(t.size for n, t in plan.targets.items() if n not in others)
    report = {k: v for k, v in decisions.report.items() if k != "warnings"}
    return {
        "source_type": mixture.layout.model_type,
        "target_type": mixture.layout.model_type,
        "layers": list(mixture.layers),
        "top_k": mixture.top_k,
        "expert_width": width,
        "layout": "per-expert" if per_expert else "fused",
        "counts": layout,
        "experts": removed(mixture, layers)["experts_after"],
        "parameters": plan.parameters,
        "active_parameters": plan.parameters - idle,
        "input_bytes": sum(size for size, _ in mixture.source.files.values()),
        "expert_bytes_before": mixture.expert_bytes(),
        "expert_bytes_after": expert,
        "reduction": decided.verb,
        "method_used": decided.method,
        **removed(mixture, layers),
        **report,
        "decisions": decided.as_json(),
    }


def files(decided: Decided) -> dict[str, bytes]:
    """decisions.json (to replay), experts.json and experts.jsonl (for load-time pruning by a
    server).
    """
    return {"decisions.json": render(decided.as_json()).encode(), **experts_lists(decided)}
