"""The layout of the class that a checkpoint was saved from: a family has one for each task, and one
without a head, whose names lack what stands before them in all others.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from moetool.data import JsonObject
from moetool.surgery.family import MAY, Bare, Slot, Tower
from moetool.surgery.layout import Layout


def layout_of(config: JsonObject) -> Layout:
    """The layout of a config's family, for the class that `architectures` names. MoetoolError
    where the family is unknown.
    """
    said = config.get("architectures")
    named = said[0] if isinstance(said, list) and said and isinstance(said[0], str) else ""
    return _of(str(config.get("model_type")), named)


@lru_cache(maxsize=64)
def _of(model_type: str, named: str) -> Layout:
    layout = Layout.load(model_type)
    if not named or _head(named) == _head(layout.cls):
        return layout
    if layout.bare is not None and named == layout.bare.cls:
        return _bared(layout, layout.bare)
    return replace(layout, tensors=tuple(_may(slot, layout) for slot in layout.tensors))


def _head(cls: str) -> str:
    """What a class is for: what comes after `For` in its name, or the whole name."""
    name, _, head = cls.partition("For")
    return head or name


def _may(slot: Slot, layout: Layout) -> Slot:
    """Of another head: what lies outside the layers and the class without a head need not be
    there.
    """
    inside = layout.bare is not None and slot.name.startswith(layout.bare.prefix)
    return slot if slot.layers is not None or inside else replace(slot, layers=MAY)


def _bared(layout: Layout, bare: Bare) -> Layout:
    """Without what stands before names, and without what stands elsewhere."""

    def short(name: str) -> str:
        return name.removeprefix(bare.prefix)

    kept = [slot for slot in layout.tensors if slot.name.startswith(bare.prefix)]
    slots = [replace(slot, name=short(slot.name)) for slot in kept]
    slots += [Slot(name, None, layers=MAY) for name in bare.more]
    names = {slot.name for slot in slots}
    tied = {short(k): short(v) for k, v in layout.tied.items()}
    return replace(
        layout,
        cls=bare.cls,
        stack=layout.stack and short(layout.stack),
        tensors=tuple(slots),
        tied={k: v for k, v in tied.items() if {k, v} <= names},
        towers=tuple(
            _tower(tower, short(tower.stack), short(tower.stem)) for tower in layout.towers
        ),
    )


def _tower(tower: Tower, stack: str, stem: str) -> Tower:
    return replace(tower, stack=stack, stem=stem)
