"""`inspect`: what a checkpoint is, from its headers and config alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from moetool.data import JsonObject
from moetool.report import contradictions
from moetool.surgery import forms
from moetool.surgery.active import Matching, RoutedLayer
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import Group
from moetool.surgery.layout import Matched
from moetool.surgery.spec import Stored
from moetool.surgery.text_model import TextModel


@dataclass
class _Layer:
    tensors: list[Stored] = field(default_factory=list)
    routed: RoutedLayer = field(default_factory=RoutedLayer)
    ffn: int | None = None
    expert_width: int | None = None
    shared: int | None = None
    router: str | None = None
    router_bias: bool = False


def anatomy(checkpoint: Checkpoint) -> JsonObject:
    """Family, parameters (total and active), each layer's FFN, experts and router, dtypes, shards,
    ties, unknown names.
    """
    matching = Matching.of(checkpoint.config, checkpoint.tensors)
    family, at, top_k = matching.family, matching.text, matching.top_k
    hidden = at.field("hidden") if at else None
    layers: dict[tuple[str, int], _Layer] = defaultdict(_Layer)
    unknown: list[str] = []
    for stored in checkpoint.tensors.values():
        found = matching.match(stored.name)
        if found is None:
            unknown.append(stored.name)
        elif found.layer is not None:
            _note(layers[matching.tower(stored.name), found.layer], found, stored, hidden)
    rows = [_row(where, layers[where]) for where in sorted(layers)]
    total = forms.count(checkpoint.tensors.values())
    return {
        "path": checkpoint.folder,
        "family": checkpoint.config.get("model_type"),
        "class": (checkpoint.config.get("architectures") or [None])[0],
        "known": family is not None,
        "kind": "moe" if any(r["experts"] for r in rows) else "dense",
        "parameters": total,
        "active_parameters": total - sum(n.routed.idle(top_k) for n in layers.values()),
        **_files(checkpoint),
        "top_k": top_k if any(r["experts"] for r in rows) else None,
        "hidden": hidden,
        "vocab": at.field("vocab") if at else None,
        "tied": [n for n in (family.tied if family else {}) if n not in checkpoint.tensors],
        "law": (at.layout.overlay.law.as_json() or None) if at else None,
        "unknown_tensors": sorted(unknown),
        "contradictions": _contradictions(checkpoint, at, rows),
        "layers": rows,
        "groups": [_group(group) for group in at.groups] if at else [],
    }


def _contradictions(
    checkpoint: Checkpoint, at: TextModel | None, rows: list[JsonObject]
) -> list[str]:
    """Where config and tensors say different things; rows of layers outside the text model are
    none of its.
    """
    if at is None:
        return []
    inside = {n for name in checkpoint.tensors if (n := at.layer_of(name)) is not None}
    held = {row["layer"]: row["experts"] or 0 for row in rows if row["layer"] in inside}
    return contradictions.found(checkpoint, at, held)


def _group(group: Group) -> JsonObject:
    """A group of experts, in one line of words."""
    route = group.route
    return {
        "name": group.name,
        "site": group.site,
        "tower": group.tower,
        "experts": f"{group.experts} x {group.form}, {group.base}",
        "layers": list(group.layers),
        "route": f"{route.key}, {route.law}, top-{route.top_k}",
        "note": route.note(group.choices),
    }


def _files(checkpoint: Checkpoint) -> JsonObject:
    """What the files hold."""
    stored_as = Counter(
        t.parts.form for t in checkpoint.tensors.values() if t.parts and not forms.lies_plain(t)
    )
    return {
        "bytes": sum(size for size, _ in checkpoint.files.values()),
        "tensors": len(checkpoint.stored),
        "shards": len(checkpoint.files),
        "dtypes": dict(sorted(Counter(t.dtype for t in checkpoint.stored.values()).items())),
        "forms": dict(sorted(stored_as.items())),
        "hub_class": checkpoint.hub_class,
    }


def _note(layer: _Layer, found: Matched, stored: Stored, hidden: int | None) -> None:
    role, shape = found.slot.role or "", stored.shape or (0,)  # a number alone has no width
    layer.tensors.append(stored)
    layer.routed.add(stored, found)
    if role == "expert.down":
        if found.expert is not None:
            layer.expert_width = shape[-1]
        elif len(shape) == 3:
            layer.expert_width = shape[1] if shape[2] == hidden else shape[2]
    elif role in ("ffn.down", "ffn.fc2"):
        layer.ffn = shape[-1]
    elif role == "shared.down":
        layer.shared = shape[-1]
    elif role == "router":
        layer.router = f"{stored.dtype} {list(stored.shape)}"
    elif role == "router.bias":
        layer.router_bias = True


def _row(where: tuple[str, int], layer: _Layer) -> JsonObject:
    tower, number = where
    return {
        "layer": number,
        **({"tower": tower} if tower else {}),
        "ffn": layer.ffn,
        "experts": layer.routed.count,
        "stacked": layer.routed.stacked > 0,
        "expert_width": layer.expert_width,
        "shared": layer.shared,
        "router": layer.router,
        "router_bias": layer.router_bias,
        "parameters": forms.count(layer.tensors),
    }
