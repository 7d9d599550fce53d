"""`inspect`: what a checkpoint is, from its headers and config alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from moetool.errors import MoetoolError
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.layout import Found, Layout
from moetool.surgery.spec import Stored


@dataclass
class _Layer:
    parameters: int = 0
    ffn: int | None = None
    experts: set[int] = field(default_factory=set)
    stacked: int | None = None
    expert_width: int | None = None
    expert_parameters: int = 0
    shared: int | None = None
    router: str | None = None
    router_bias: bool = False


def anatomy(checkpoint: Checkpoint) -> dict[str, Any]:
    """Family, parameters (total and active), each layer's FFN, experts and router, dtypes, shards,
    ties, unknown names.
    """
    model_type = checkpoint.config.get("model_type")
    layout = _layout(model_type)
    text_type = (checkpoint.config.get("text_config") or {}).get("model_type")
    inner = (
        _layout(text_type)
        if text_type and (layout is None or layout.role("router") is None)
        else None
    )
    layers: dict[int, _Layer] = defaultdict(_Layer)
    unknown: list[str] = []
    total = 0
    for stored in checkpoint.tensors.values():
        count = stored.elements
        total += count
        found = _recognise(stored.name, layout, inner)
        if found is None:
            unknown.append(stored.name)
        elif found.layer is not None and not any(w in stored.name for w in ("visual", "vision")):
            _note(layers[found.layer], found, stored, count)
    home = inner or layout
    top_k = (
        home.field(
            "top_k", checkpoint.config if home is layout else checkpoint.config["text_config"]
        )
        if home
        else None
    )
    rows = [_row(number, layers[number]) for number in sorted(layers)]
    idle = sum(_idle(layers[n], top_k) for n in layers)
    text = (
        home.text(
            checkpoint.config if home is layout else checkpoint.config.get("text_config") or {}
        )
        if home
        else {}
    )
    tied = [n for n in (layout.tied if layout else {}) if n not in checkpoint.tensors]
    return {
        "path": checkpoint.folder,
        "family": model_type,
        "class": (checkpoint.config.get("architectures") or [None])[0],
        "known": layout is not None,
        "kind": "moe" if any(r["experts"] for r in rows) else "dense",
        "parameters": total,
        "active_parameters": total - idle,
        "bytes": sum(size for size, _ in checkpoint.files.values()),
        "tensors": len(checkpoint.stored),
        "shards": len(checkpoint.files),
        "dtypes": dict(sorted(Counter(t.dtype for t in checkpoint.stored.values()).items())),
        "forms": dict(
            sorted(Counter(t.parts.form for t in checkpoint.tensors.values() if t.parts).items())
        ),
        "top_k": top_k if any(r["experts"] for r in rows) else None,
        "hidden": text.get(home.fields.get("hidden", "")) if home else None,
        "vocab": text.get(home.fields.get("vocab", "")) if home else None,
        "tied": tied,
        "law": (home.overlay.law or None) if home else None,
        "unknown_tensors": sorted(unknown),
        "layers": rows,
    }


def _layout(model_type: Any) -> Layout | None:
    try:
        return Layout.load(str(model_type))
    except MoetoolError:
        return None


def _recognise(name: str, layout: Layout | None, inner: Layout | None) -> Found | None:
    found = layout.match(name) if layout else None
    if found is None and inner is not None:
        for prefix in ("language_model.", "model.language_model.", ""):
            if name.startswith(prefix) and (found := _any_form(inner, name.removeprefix(prefix))):
                return found
    return found or (_any_form(layout, name) if layout else None)


def _any_form(layout: Layout, name: str) -> Found | None:
    """Also the stacked names of a family whose files are per-expert."""
    found = layout.match(name)
    if found is None:
        for role, template in layout.fused().items():
            head, _, tail = template.partition("{layer}")
            number = (
                name[len(head) : len(name) - len(tail)]
                if name.startswith(head) and name.endswith(tail)
                else ""
            )
            slot = layout.role(f"expert.{'up' if role == 'gate_up' else 'down'}")
            if number.isdigit() and slot:
                return Found(type(slot)(template, None, f"expert.{role}", "moe"), int(number))
    return found


def _note(layer: _Layer, found: Found, stored: Stored, count: int) -> None:
    role = found.slot.role or ""
    layer.parameters += count
    if role.startswith("expert."):
        layer.expert_parameters += count
        if found.expert is not None:
            layer.experts.add(found.expert)
            if role == "expert.down":
                layer.expert_width = stored.shape[-1]
        elif role in ("expert.down", "expert.gate_up"):
            layer.stacked = stored.shape[0]
            if role == "expert.down" and len(stored.shape) == 3:
                layer.expert_width = stored.shape[2]
    elif role in ("ffn.down", "ffn.fc2"):
        layer.ffn = stored.shape[-1]
    elif role == "shared.down":
        layer.shared = stored.shape[-1]
    elif role == "router":
        layer.router = f"{stored.dtype} {list(stored.shape)}"
    elif role == "router.bias":
        layer.router_bias = True


def _row(number: int, layer: _Layer) -> dict[str, Any]:
    return {
        "layer": number,
        "ffn": layer.ffn,
        "experts": len(layer.experts) or layer.stacked or 0,
        "stacked": layer.stacked is not None,
        "expert_width": layer.expert_width,
        "shared": layer.shared,
        "router": layer.router,
        "router_bias": layer.router_bias,
        "parameters": layer.parameters,
    }


def _idle(layer: _Layer, top_k: Any) -> int:
    """Parameters of the experts that a token does not use."""
    count = len(layer.experts) or layer.stacked or 0
    if not count or not isinstance(top_k, int):
        return 0
    return layer.expert_parameters * (count - min(top_k, count)) // count
