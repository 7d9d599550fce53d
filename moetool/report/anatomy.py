"""`inspect`: what a checkpoint is, from its headers and config alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.layout import Layout, Matched
from moetool.surgery.spec import Stored
from moetool.surgery.text_model import any_text_model


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


def anatomy(checkpoint: Checkpoint) -> JsonObject:
    """Family, parameters (total and active), each layer's FFN, experts and router, dtypes, shards,
    ties, unknown names.
    """
    family = _layout(checkpoint.config.get("model_type"))
    at = any_text_model(checkpoint.config, checkpoint.tensors)
    layers: dict[int, _Layer] = defaultdict(_Layer)
    unknown: list[str] = []
    for stored in checkpoint.tensors.values():
        found = (family and family.match(stored.name)) or (at and at.match(stored.name))
        if not found:
            unknown.append(stored.name)
        elif found.layer is not None:
            _note(layers[found.layer], found, stored, stored.elements)
    top_k = at.field("top_k") if at else None
    rows = [_row(number, layers[number]) for number in sorted(layers)]
    total = sum(stored.elements for stored in checkpoint.tensors.values())
    return {
        "path": checkpoint.folder,
        "family": checkpoint.config.get("model_type"),
        "class": (checkpoint.config.get("architectures") or [None])[0],
        "known": family is not None,
        "kind": "moe" if any(r["experts"] for r in rows) else "dense",
        "parameters": total,
        "active_parameters": total - sum(_idle(layer, top_k) for layer in layers.values()),
        **_files(checkpoint),
        "top_k": top_k if any(r["experts"] for r in rows) else None,
        "hidden": at.field("hidden") if at else None,
        "vocab": at.field("vocab") if at else None,
        "tied": [n for n in (family.tied if family else {}) if n not in checkpoint.tensors],
        "law": (at.layout.overlay.law.as_json() or None) if at else None,
        "unknown_tensors": sorted(unknown),
        "layers": rows,
    }


def _files(checkpoint: Checkpoint) -> JsonObject:
    """What the files hold."""
    forms = Counter(t.parts.form for t in checkpoint.tensors.values() if t.parts)
    return {
        "bytes": sum(size for size, _ in checkpoint.files.values()),
        "tensors": len(checkpoint.stored),
        "shards": len(checkpoint.files),
        "dtypes": dict(sorted(Counter(t.dtype for t in checkpoint.stored.values()).items())),
        "forms": dict(sorted(forms.items())),
    }


def _layout(model_type: object) -> Layout | None:
    try:
        return Layout.load(str(model_type))
    except MoetoolError:
        return None


def _note(layer: _Layer, found: Matched, stored: Stored, count: int) -> None:
    role, shape = found.slot.role or "", stored.shape or (0,)  # a number alone has no width
    layer.parameters += count
    if role.startswith("expert."):
        layer.expert_parameters += count
        if found.expert is not None:
            layer.experts.add(found.expert)
            if role == "expert.down":
                layer.expert_width = shape[-1]
        elif role in ("expert.down", "expert.gate_up"):
            layer.stacked = shape[0]
            if role == "expert.down" and len(shape) == 3:
                layer.expert_width = shape[2]
    elif role in ("ffn.down", "ffn.fc2"):
        layer.ffn = shape[-1]
    elif role == "shared.down":
        layer.shared = shape[-1]
    elif role == "router":
        layer.router = f"{stored.dtype} {list(stored.shape)}"
    elif role == "router.bias":
        layer.router_bias = True


def _row(number: int, layer: _Layer) -> JsonObject:
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


def _idle(layer: _Layer, top_k: object) -> int:
    """Parameters of the experts that a token does not use."""
    count = len(layer.experts) or layer.stacked or 0
    if not count or not isinstance(top_k, int):
        return 0
    return layer.expert_parameters * (count - min(top_k, count)) // count
