"""The modules of a site whose linears have no role in a layout: found by the words for their names
in archs/sites.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache

from moetool.errors import MoetoolError
from moetool.surgery.family import Slot
from moetool.surgery.ffn import NORM, FfnLinear
from moetool.surgery.layout import DATA, Layout

_WEIGHT = ".weight"


@lru_cache(maxsize=1)
def _words() -> Mapping[str, Mapping[str, str]]:
    """site -> role -> pattern of what stands in a name between the layer's number and `weight`."""
    found: Mapping[str, Mapping[str, str]] = json.loads((DATA / "sites.json").read_text())
    return found


def linears(layout: Layout, site: str, mixture: bool = False) -> tuple[FfnLinear, ...]:
    """Those of a layer, in the order of their roles. MoetoolError where the family has none, no
    plain stack of layers that are alike, or, without `mixture`, experts already.
    """
    slots = {slot.name: slot for slot in layout.tensors}
    turned = layout.overlay.linears == "transposed"
    found = []
    for role, pattern in _words()[site].items():
        for slot in layout.tensors:
            if _inside(slot) and re.fullmatch(pattern, slot.name.partition("{layer}.")[2][:-7]):
                bias = slots.get(slot.name.removesuffix(_WEIGHT) + ".bias")
                is_norm = role == NORM
                found.append(FfnLinear(role, slot, bias, turned and not is_norm, is_norm))
    if (layout.kind == "moe" and not mixture) or not layout.stack or not found:
        has = "it has experts already" if layout.kind == "moe" else f"stack {layout.stack}"
        raise homeless(layout, site, "a plain stack of dense layers with one", has)
    return tuple(found)


def _inside(slot: Slot) -> bool:
    """Whether it is the weight of a module in a layer of the stack."""
    inside = slot.name.partition("{layer}.")[2]
    return inside.endswith(_WEIGHT) and "{" not in inside


def homeless(layout: Layout, site: str, expected: str, found: str) -> MoetoolError:
    """What to say of a family that has no such site."""
    return MoetoolError(
        f"{layout.model_type} has no place for groups of experts at the site {site}",
        expected=expected,
        found=found,
        hint=f"`moetool archs show {layout.model_type}` shows what is known of it",
    )
