"""The stacks of layers of a family beside the text model's: each as a layout of its own, which is
asked as the text model's is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError, did_you_mean
from moetool.surgery.family import Slot, Tower
from moetool.surgery.groups import TEXT
from moetool.surgery.layout import Layout

AUTO = "auto"
KNOWN = (
    TEXT,
    "vision",
    "audio",
    "encoder",
    "decoder",
    "qformer",
    "projector",
)  # in the order of a help


def names(layout: Layout) -> list[str]:
    """Those of a family, text first."""
    found = dict.fromkeys(tower.name for tower in layout.towers)
    return [*([TEXT] if layout.stack or TEXT in found else ()), *(n for n in found if n != TEXT)]


def said(layout: Layout, name: str) -> bool:
    """Whether data of its own says where the FFN of a tower lies."""
    return any(tower.name == name for tower in layout.towers)


def meant(layout: Layout, said: str) -> str:
    """The tower that `auto` means: text, or the only one. UsageError where there are several, or
    none of the name that is said.
    """
    known = names(layout)
    if said in known:
        return said
    if said == AUTO and (TEXT in known or len(known) == 1):
        return known[0]
    if said == AUTO and not known:
        return TEXT  # whoever looks for it there says what is missing
    raise UsageError(
        f"{layout.model_type} has several towers" if said == AUTO else _none(layout, said),
        expected=f"--tower {', '.join(known)}"
        if known
        else "a family that `archs show` has some of",
        found=f"--tower {said}",
        hint="name one of them" if known else f"see `moetool archs show {layout.model_type}`",
    )


def layout_of(layout: Layout, name: str, config: JsonObject) -> Layout:
    """The layout of a tower alone, for a model with this config. MoetoolError where the family has
    none of this name, or none under this config.
    """
    found = next((t for t in layout.towers if t.name == name and _present(layout, t, config)), None)
    if found is None and name == TEXT and layout.stack and not said(layout, name):
        return layout
    if found is None:
        has = said(layout, name)
        raise MoetoolError(
            f"the FFN of {layout.model_type}'s {name} tower lies in a way nothing is known of"
            if has
            else _none(layout, name),
            file="config.json",
            expected=" or ".join(t.when or "" for t in layout.towers if t.name == name)
            if has
            else ", ".join(names(layout)) or "a family with towers",
            found=name,
            hint=did_you_mean(name, names(layout))
            if not has
            else f"see `moetool archs show {layout.model_type}`",
        )
    if found.stack == layout.stack:
        return layout
    same = found.config == layout.text_config
    fields = (layout.fields if same else {}) | found.fields
    return replace(
        layout,
        stack=found.stack,
        text_config=found.config,
        fields=fields,
        aliases=layout.aliases if same else {},
        tensors=tuple(_slots(layout, found)),
        towers=(found,),
    )


def lying(layout: Layout) -> Tower | None:
    """What is said of the FFN in the layout's own stack, where roles do not say it."""
    return next((t for t in layout.towers if t.stack == layout.stack), None)


def _none(layout: Layout, name: str) -> str:
    return f"{layout.model_type} has no {name} tower"


def _present(layout: Layout, tower: Tower, config: JsonObject) -> bool:
    """Whether a tower is as it is said under this config."""
    if tower.when is None:
        return True
    name, _, value = tower.when.partition("=")
    return bool(layout.text(config).get(name) == json.loads(value))


def _slots(layout: Layout, tower: Tower) -> Iterator[Slot]:
    """The family's slots in a tower, its layers' number as the text model's is written."""
    for slot in layout.tensors:
        rest = slot.name.removeprefix(tower.stem)
        if tower.single and rest.startswith("."):  # shapes are said in fields of another part
            yield Slot(slot.name, slot.shape and [None] * len(slot.shape), slot.role)
        if rest != slot.name and rest.startswith("{"):
            name = tower.stem + re.sub(r"^\{\w+\}", "{layer}", rest)
            yield Slot(name, slot.shape, slot.role, slot.layers, slot.when)
