"""Routers whose weights a small network corrects (MoExtend, arXiv 2408.03511), as a config says
them.

    "moetool": {"version": 1, "ragged": true, "calibration": {"layers": [1, 3], "width": 16}}

In those layers a token's weights are those of p + C(p) for the experts that p, the softmax of the
router's scores, chooses; C is a linear, GELU and a linear without biases, beside the router's own
tensor:

    ROUTER.calibration.up.weight      [width, experts]
    ROUTER.calibration.down.weight    [experts, width]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moetool.data import JsonMapping
from moetool.errors import did_you_mean
from moetool.surgery.family import GroupSlot
from moetool.surgery.strict import edited

if TYPE_CHECKING:
    from moetool.surgery.layout import Layout

NAME, ROLE = "calibration", "router.calibration"
INTO, OUT = "up.weight", "down.weight"
MOST = 4096  # neurons
_KEYS = ("layers", "width")


@dataclass(frozen=True)
class Correction:
    """The layers whose routers have one, and its neurons."""

    layers: tuple[int, ...]
    width: int

    def as_json(self) -> dict[str, object]:
        return {"layers": list(self.layers), "width": self.width}


def read(said: object) -> Correction | None:
    """What a config says of it; None where it says nothing. MoetoolError for anything else than
    layers, each once, and a width.
    """
    if said is None:
        return None
    if not isinstance(said, dict):
        raise edited("`calibration` is no object", "layers and width", said)
    for name in said:
        if name not in _KEYS:
            hint = did_you_mean(str(name), _KEYS)
            raise edited(f"calibration has the unknown key {name!r}", "layers, width", name, hint)
    layers, width = said.get("layers"), said.get("width")
    if type(width) is not int or not 1 <= width <= MOST:
        raise edited("`width` of calibration", f"a number from 1 to {MOST:,}", width)
    numbers = type(layers) is list and all(type(n) is int and n >= 0 for n in layers)
    if not numbers or not layers or len(set(layers)) != len(layers):
        raise edited("`layers` of calibration", "at least one, each once", layers)
    return Correction(tuple(layers), width)


def of(config: JsonMapping) -> Correction | None:
    """That of a whole config, if it has one."""
    said = config.get("moetool")
    return read(said.get(NAME)) if isinstance(said, dict) else None


def why_not(layout: Layout) -> str:
    """Why the routers of a family cannot have one, for people; empty where they can: it corrects
    shares of a softmax over all experts.
    """
    law, router = layout.overlay.law, layout.role("router")
    plain = law.score == "softmax" and not (law.groups or law.near or law.least_sum or law.act)
    if router is None or not plain or layout.role("router.bias") or law.total != 1.0:
        return f"the routers of {layout.model_type} are no plain softmax over all experts"
    block = f"{stem(layout).rpartition('.')[0]}."
    experts = [s.name for s in layout.tensors if str(s.role).startswith("expert.")]
    experts += layout.per_expert().values()
    beside = any(name.startswith(block) for name in experts)
    if not layout.stack or not beside or block.endswith("{layer}."):
        return f"the routers of {layout.model_type} are no modules of their own beside the experts"
    return ""


def stem(layout: Layout) -> str:
    """The template of the module that a router's tensors lie in."""
    router = layout.role("router")
    assert router is not None
    return router.name.removesuffix(".weight")


def grown(layout: Layout, held: Correction, moe: set[int]) -> Layout:
    """The layout with slots for it. MoetoolError for a layer without experts, and for a family
    whose routers cannot have one.
    """
    if why := why_not(layout):
        raise edited(why, "a family with softmax routers", layout.model_type)
    if not set(held.layers) <= moe:
        raise edited("`layers` of calibration", f"some of {sorted(moe)}", list(held.layers))
    there, experts = dict.fromkeys(held.layers, 1), layout.fields["experts"]
    shapes = {INTO: [str(held.width), experts], OUT: [experts, str(held.width)]}
    more = [
        GroupSlot(f"{stem(layout)}.{NAME}.{part}", [*shape], ROLE, "held", held=there)
        for part, shape in shapes.items()
    ]
    return replace(layout, tensors=(*layout.tensors, *more))
