"""The config of an upcycled model: fields of the new family, filled from the shape of its experts."""

from __future__ import annotations

from dataclasses import dataclass

from moetool.data import JsonObject
from moetool.methods.upcycle.experts import idle_width
from moetool.methods.upcycle.targets import Conversion
from moetool.surgery import pair as pairing
from moetool.surgery.layout import Layout


@dataclass(frozen=True)
class Shape:
    """What the config must say of the experts. `width`: of the FFN they come from."""

    layers: tuple[int, ...]
    experts: int
    top_k: int
    width: int
    expert_width: int
    shared: bool
    routed_scale: float


def config_of(chosen: Conversion, whole: JsonObject, shape: Shape) -> pairing.Config:
    """The new config. `whole`: the source's, around the text model where there is one."""
    decided = _counts(chosen.target, shape)
    count = chosen.source.field("layers", chosen.config)
    decided |= chosen.target.overlay.sites.fields(shape.layers, count, shape.width)
    inner = pairing.map_config(chosen.pair, chosen.source, chosen.target, chosen.config, decided)
    if chosen.outer is None:
        return inner
    around = {k: v for k, v in whole.items() if k != "text_config"}
    dropped = {f"text_config.{k}": v for k, v in inner.dropped.items()}
    return pairing.Config(around | {"text_config": inner.value}, dropped)


def _counts(target: Layout, shape: Shape) -> JsonObject:
    """Fields that count and measure experts, under the family's names."""
    fields = target.fields
    decided: JsonObject = {fields["experts"]: shape.experts, fields["top_k"]: shape.top_k}
    for alias, real in target.aliases.items():
        if real == fields["experts"] and alias in ("num_experts", "num_local_experts"):
            decided[alias] = shape.experts
    width = fields.get("expert_width", fields.get("width", "intermediate_size"))
    decided[width] = shape.expert_width
    if "expert_width" in fields and "width" in fields:
        decided[fields["width"]] = shape.width
    if "routed_scale" in fields:
        decided[fields["routed_scale"]] = shape.routed_scale
    return decided | _shared(target, shape.width if shape.shared else 0, shape.expert_width)


def _shared(target: Layout, width: int, expert_width: int) -> JsonObject:
    """Config fields for a shared expert of this width (0 for none)."""
    rule = target.overlay.shared
    if rule is None:
        return {}
    width = width or idle_width(rule, expert_width)
    if rule.count:
        return {rule.count: width // expert_width}
    return {rule.width: width} if rule.width else {}
