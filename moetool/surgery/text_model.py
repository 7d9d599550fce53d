"""Where in a checkpoint the text model is: its layout, its part of the config, the prefix of its
names. The one finder; every verb, the walk and all checks ask it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery import calibrated, classes, groups, grown, ragged, towers
from moetool.surgery.calibrated import Correction
from moetool.surgery.family import Slot, filled
from moetool.surgery.groups import Group
from moetool.surgery.layout import Layout, Matched, kinds


@dataclass(frozen=True)
class TextModel:
    """The part of a checkpoint that is a text model: its layout, the config to read with it, the
    prefix of its names, and the path to the fields inside the whole config.
    """

    layout: Layout
    config: JsonObject
    prefix: str = ""
    path: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()  # of experts that no stock class holds
    towers: Mapping[str, TextModel] = field(default_factory=dict)  # others, with groups of theirs
    calibration: Correction | None = None  # of its routers' weights

    def of(self, group: Group) -> TextModel:
        """Where a group stands."""
        return self.towers.get(group.tower, self)

    def tower(self, name: str) -> str:
        """The tower beside the text model that a name lies in, of those with groups; else nothing."""
        return next((n for n, at in self.towers.items() if at.match(name)), "")

    def anywhere(self, name: str) -> tuple[Matched | None, Layout]:
        """Which slot a name fills, in a tower with groups or here, and whose slot it is."""
        at = self.towers.get(self.tower(name), self)
        return at.match(name), at.layout

    @property
    def text(self) -> JsonObject:
        """The text part of the config, defaults filled in."""
        return self.layout.text(self.config)

    def field(self, meaning: str) -> Any:
        """The value of a config field by meaning (`experts`, `top_k`, `layers`, ...), or None."""
        return self.layout.field(meaning, self.config)

    def moe_layers(self) -> list[int]:
        """Numbers of the layers that hold experts, as the config says."""
        return sorted(self.layout.moe_layers(self.config))

    def must_be_alike(self) -> str:
        """Why no layer can have a number of experts of its own, for people; empty where it can."""
        layout, known = self.layout, self.layout.defaults
        for part in filter(None, layout.text_config.split(".")):
            known = known.get(part) or {}
        if not layout.stack:
            return f"{layout.model_type} has no plain stack of layers that moetool could build"
        if self.text.get(ragged.KEY) or known.get(ragged.KEY):
            own = f"have other settings of their own already ({ragged.KEY})"
            return f"layers of {layout.model_type} {own}"
        return ""

    def own_counts(self) -> dict[int, int]:
        """{layer: experts} of the layers that hold another number than the config says for all, in
        a ragged model. MoetoolError where the config says it wrongly.
        """
        if self.calibration and ragged.KEY not in self.text:
            return {}  # all hold as many
        own, aliases = self.layout.fields.get("experts", ""), self.layout.aliases
        names = [own, *(alias for alias, real in aliases.items() if real == own)]
        known = names if self.layout.kind == "moe" else []
        return ragged.read(self.text, self.moe_layers(), known)

    def name(self, template: str, **numbers: int | None) -> str:
        """A tensor's name in the file."""
        return self.prefix + filled(template, **numbers)

    def inner(self, name: str) -> str | None:
        """A name in the file as the layout has it; None outside the text model."""
        return name.removeprefix(self.prefix) if name.startswith(self.prefix) else None

    def match(self, name: str) -> Matched | None:
        """Which slot a name in the file fills, stacked experts included; None for any other."""
        inner = self.inner(name)
        if inner is None:
            return None
        return self.layout.match(inner) or self._stacked(inner)

    def layer_of(self, name: str) -> int | None:
        """The layer that a name in the file lies in, whether the family knows the name or not."""
        found = self.match(name)
        if found is not None:
            return found.layer if self.layout.in_text(found.slot) else None
        inner = self.inner(name) or ""
        number = inner.removeprefix(self.layout.stem).partition(".")[0]
        return int(number) if inner.startswith(self.layout.stem) and number.isdigit() else None

    def _stacked(self, inner: str) -> Matched | None:
        """A stacked tensor of a family whose files have one tensor an expert."""
        for role, template in self.layout.fused().items():
            slot = Slot(template, None, f"expert.{role}", "moe")
            found = re.fullmatch(re.escape(template).replace(r"\{layer\}", r"(\d+)"), inner)
            if found:
                return Matched(slot, {"layer": int(found[1])})
        return None


def text_model(config: JsonObject) -> TextModel:
    """Where the text model of this config is described: the family itself, or, in a multimodal
    family that only wraps a model of another family, that one. With groups of experts, the layout
    has slots for them too.
    """
    if not groups.is_ours(config):
        return _native(config)
    held, base = groups.read(config), groups.base_of(config)
    at = _native(base)
    if groups.is_ragged(config):
        at = _calibrated(at, calibrated.of(config))
        at.own_counts()  # refuses what it cannot hold
    return _with_groups(at, base, held) if held else at


def _calibrated(at: TextModel, held: Correction | None) -> TextModel:
    if held is None:
        return at
    made = calibrated.grown(at.layout, held, at.layout.moe_layers(at.config))
    return replace(at, layout=made, calibration=held)


def _with_groups(at: TextModel, base: JsonObject, held: tuple[Group, ...]) -> TextModel:
    """The text model of a config with these groups, in all towers."""
    layout, found = at.layout, dict[str, TextModel]()
    for name in dict.fromkeys(group.tower for group in held):
        here, tower = [g for g in held if g.tower == name], tower_of(base, name)
        count = tower.field("layers") or 0
        made = grown.grown(tower.layout, here, count)
        kept = grown.without(layout, tower.layout, here, count)
        if tower.prefix == at.prefix and _is_one(tower.layout, at.layout):
            kept = (*kept, *made.tensors[len(tower.layout.tensors) :])
        if tower != at:
            found[name] = replace(tower, layout=made, groups=tuple(here))
        layout = replace(layout, tensors=kept)
    family, cls = layout.family, f"Moe{layout.cls}"
    layout = replace(layout, model_type=groups.MODEL_TYPE, base=family, cls=cls)
    return replace(at, layout=layout, groups=held, towers=found)


def _is_one(tower: Layout, layout: Layout) -> bool:
    """Whether a tower's layers are the ones that the family's layout numbers."""
    return (tower.stem, tower.text_config) == (layout.stem, layout.text_config)


def tower_of(config: JsonObject, name: str) -> TextModel:
    """A tower of a model of this config; `text` is the text model. MoetoolError where the family
    has no such tower.
    """
    if groups.is_ours(config):
        at = text_model(config)
        if name in at.towers or any(g.tower == name for g in at.groups):
            return at.towers.get(name, at)
        config = groups.base_of(config)
    at = _native(config)
    if name == groups.TEXT and at.layout.stack and not towers.said(at.layout, name):
        return at
    layout = towers.layout_of(classes.layout_of(config), name, config)
    return TextModel(layout, config, "", tuple(filter(None, layout.text_config.split("."))))


def _native(config: JsonObject) -> TextModel:
    layout = classes.layout_of(config)
    path = tuple(filter(None, layout.text_config.split(".")))
    text, known = config, layout.defaults
    for part in path:
        text, known = text.get(part) or {}, known.get(part) or {}
    inner = text.get("model_type") or known.get("model_type")
    if layout.kind == "dense" and path and inner in kinds():
        wrapped = Layout.load(inner)
        head = layout.stem.removesuffix(wrapped.stem)
        if wrapped.stack and layout.stem == head + wrapped.stem and head.endswith("."):
            return TextModel(wrapped, text, head, path)
    return TextModel(layout, config, "", path)


def any_text_model(config: JsonObject, names: Iterable[str]) -> TextModel | None:
    """The text model of a checkpoint whose family may be unknown: then that of its text part,
    under the prefix that its names have. None where that is unknown too.
    """
    with suppress(MoetoolError):
        return text_model(config)
    text = config.get("text_config") or {}
    if text.get("model_type") not in kinds():
        return None
    layout = Layout.load(text["model_type"])
    heads = (h for n in names if (h := _head(layout, n)) is not None)
    return TextModel(layout, text, next(heads, ""), ("text_config",))


def _head(layout: Layout, name: str) -> str | None:
    """What stands before a name that the layout knows: `a.b.` of `a.b.model.norm.weight`."""
    parts = name.split(".")
    cuts = (n for n in range(len(parts)) if layout.match(".".join(parts[n:])))
    cut = next(cuts, None)
    return None if cut is None else "".join(f"{p}." for p in parts[:cut])
