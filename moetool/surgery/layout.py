"""What a family's checkpoint looks like: names, shapes, roles and config fields, read from the
data in archs/.

Nothing here imports torch or transformers. Templates write the layer as `{layer}` and the expert
as `{expert}`; a shape is a list of formulas over config fields ("2*moe_intermediate_size").
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from moetool.data import JsonObject
from moetool.errors import MoetoolError, did_you_mean
from moetool.surgery import ragged
from moetool.surgery.family import (
    MAY,
    Bare,
    GroupSlot,
    Names,
    Overlay,
    Slot,
    StackedExperts,
    Tower,
    filled,
)

DATA = Path(__file__).resolve().parent.parent / "archs"
# a part of a name that is a number, or expert_7 (Switch, NLLB)
_NUMBER = re.compile(r"(?:(?<=\.)|(?<=\.expert_)|^)\d+(?=\.|$)")
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Matched:
    """A name of a checkpoint, recognised: its slot, and the numbers in it by what they number."""

    slot: Slot
    numbers: dict[str, int] = field(default_factory=dict)

    @property
    def layer(self) -> int | None:
        """The layer of the text model, if the tensor lies in one."""
        return self.numbers.get("layer")

    @property
    def expert(self) -> int | None:
        return self.numbers.get("expert")


class Needed(NamedTuple):
    """A tensor that a checkpoint must hold; a dimension is None where it cannot be told."""

    name: str
    shape: Shape | None
    slot: Slot


@dataclass(frozen=True)
class Layout:
    """One family. Made by `Layout.load`; every key of the data file is a field here, an unknown
    key is an error. `stack`: the module of transformers' class that holds the layers which text
    goes through, None where there is no plain one; `base`: the family that a layout with groups of
    experts stands on.
    """

    model_type: str
    cls: str
    kind: str
    text_config: str
    stack: str | None
    fields: dict[str, str]
    aliases: dict[str, str]
    defaults: JsonObject
    tied: dict[str, str]
    tensors: tuple[Slot, ...]
    experts: StackedExperts = field(default_factory=StackedExperts)
    overlay: Overlay = field(default_factory=Overlay)
    towers: tuple[Tower, ...] = ()
    bare: Bare | None = None
    base: str = ""

    @property
    def family(self) -> str:
        """The model type of transformers' class."""
        return self.base or self.model_type

    @classmethod
    def load(cls, model_type: str) -> Layout:
        """The layout of a model type; MoetoolError with the nearest names when there is none."""
        return _load(model_type)

    @cached_property
    def _by_pattern(self) -> dict[str, list[tuple[Slot, list[str]]]]:
        found: dict[str, list[tuple[Slot, list[str]]]] = {}
        for slot in self.tensors:
            pattern, keys = slot.pattern
            found.setdefault(pattern, []).insert(0, (slot, keys))
        return found

    def match(self, name: str) -> Matched | None:
        """Which slot a tensor name fills, in which layer, for which expert; None for a name the
        family does not know.
        """
        numbers: list[int] = []

        def note(found: re.Match[str]) -> str:
            numbers.append(int(found[0]))
            return "#"

        for slot, keys in self._by_pattern.get(_NUMBER.sub(note, name), ()):
            both = [*zip(keys, numbers, strict=True)]
            if all(not key.startswith("=") or key == f"={n}" for key, n in both):
                return Matched(slot, {key: n for key, n in both if not key.startswith("=")})
        return None

    @cached_property
    def stem(self) -> str:
        """What stands before the layer's number in the names of most tensors in layers."""
        heads = (s.name.partition("{layer}")[0] for s in self.tensors if "{layer}" in s.name)
        return max(Counter(heads).items(), key=lambda h: h[1], default=("", 0))[0]

    def in_text(self, slot: Slot) -> bool:
        """Whether a slot is of the text model, not of a tower beside it."""
        if self.stack is None or "{layer}" in slot.name:
            return True
        module = self.stem.rstrip(".").rpartition(".")[0]
        return "{i0}" not in slot.name and (slot.name.startswith(module) or slot.name in self.tied)

    def fused(self) -> dict[str, str]:
        """{"gate_up": template, "down": template} of the stacked form [experts, 2*width, hidden];
        empty where there is none.

        Only forms whose expert slabs are plain rows: gate above up, not transposed, not
        interleaved.
        """
        lie = self.experts
        plain = lie.is_concatenated and lie.has_gate and not lie.is_transposed
        if not plain or self.overlay.gate_up != "concatenated":
            return {}
        roles = ("gate_up", "down")
        slots = {r: self.role(f"expert.{r}") for r in roles}
        on_disk = {r: s.name for r, s in slots.items() if s}
        names = on_disk if len(on_disk) == 2 else lie.stacked
        return {r: names[r] for r in roles} if all(r in names for r in roles) else {}

    def per_expert(self) -> dict[str, str]:
        """{"gate", "up", "down"} -> template with {expert}, where the family reads that form;
        empty otherwise.
        """
        found = {r: self.role(f"expert.{r}") for r in ("gate", "up", "down")}
        if not all(s and "{expert}" in s.name for s in found.values()):
            return {}
        return {r: s.name for r, s in found.items() if s}

    def role(self, role: str) -> Slot | None:
        """The slot with this role outside vision and audio towers, if the family has one."""
        return next((s for s in self.tensors if s.role == role), None)

    def text(self, config: JsonObject) -> JsonObject:
        """The text part of a config with the class's scalar defaults filled in and aliases
        resolved.
        """
        given, known = config, self.defaults
        for part in filter(None, self.text_config.split(".")):
            given, known = given.get(part) or {}, known.get(part) or {}
        values = {k: v for k, v in known.items() if not isinstance(v, list | dict)}
        resolved = {}
        for key, value in given.items():
            real = self.aliases.get(key, key)
            if real == key or real not in given:
                resolved[real] = value
        return values | resolved

    def field(self, meaning: str, config: JsonObject) -> Any:
        """The value of a config field by meaning (`experts`, `top_k`, `layers`, ...), or None. A
        list that says the same for every layer is that value; MoetoolError for another one.
        """
        name, text = self.fields.get(meaning), self.text(config)
        if name is not None and name.isdigit():
            return int(name)
        said = (text.get(one) for one in (name or "").split("|"))
        value = next((v for v in said if v is not None), None)
        if not isinstance(value, list) or meaning == "width":
            return value
        if value[:1] in ([], [None]) or any(v != value[0] for v in value):
            raise MoetoolError(
                "a field of the config says another number for each layer",
                field=name,
                expected="one number",
                found=str(value)[:80],
                hint="moetool reads models whose layers are alike here",
            )
        return value[0]

    def evaluate(self, formula: str | None, text: JsonObject) -> int | None:
        """A shape formula as a number, or None where a field is unknown."""
        if formula is None:
            return None
        total = 0
        for term in formula.split("+"):
            product = 1
            for factor in term.split("*"):
                value = int(factor) if factor.isdigit() else self._dimension(factor, text)
                if value is None:
                    return None
                product *= value
            total += product
        return total

    def _dimension(self, name: str, text: JsonObject) -> int | None:
        value = text.get(name)
        if name == "head_dim" and not isinstance(value, int):
            hidden, heads = (
                text.get(self.fields.get("hidden", "")),
                text.get(self.fields.get("heads", "")),
            )
            if isinstance(hidden, int) and isinstance(heads, int) and heads:
                value = hidden // heads
        if name == self.fields.get("kv_heads") and value is None:
            value = text.get(self.fields.get("heads", ""))
        return value if isinstance(value, int) else None

    def shape(self, slot: Slot, text: JsonObject) -> tuple[int | None, ...] | None:
        """A slot's shape under a config, None where it cannot be told."""
        return None if slot.shape is None else tuple(self.evaluate(f, text) for f in slot.shape)

    def moe_layers(self, config: JsonObject) -> set[int]:
        """Which layers hold experts, as the config says."""
        count = self.field("layers", config) or 0
        return self.overlay.sites.layers(self.text(config), count) if self.kind == "moe" else set()

    def present(self, slot: Slot, text: JsonObject) -> bool:
        """Whether a conditional slot exists under this config."""
        if slot.when is None:
            return True
        name, _, value = slot.when.partition("=")
        return bool(text.get(name) == json.loads(value))

    def slots(self, config: JsonObject) -> Iterator[Needed]:
        """Every tensor a checkpoint with this config must hold; slots of `some` layers are left
        out.
        """
        text = self.text(config)
        layers, moe = range(self.field("layers", config) or 0), self.moe_layers(config)
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        for slot in self.tensors:
            left_out = slot.layers in ("some", MAY) or (tied and slot.name in self.tied)
            if left_out or not self.present(slot, text) or self._idle(slot, text):
                continue
            if slot.layers is None:
                yield Needed(_first(slot.name), self.shape(slot, text), slot)
                continue
            for layer in slot.held if isinstance(slot, GroupSlot) else layers:
                if _holds(slot, layer, layer in moe):
                    yield from self._in_layer(slot, layer, text)

    def _idle(self, slot: Slot, text: JsonObject) -> bool:
        """Whether this is a shared expert without neurons that the family leaves out."""
        shape, shared = self.shape(slot, text), self.overlay.shared
        if not shape or 0 not in shape or not str(slot.role).startswith("shared."):
            return False
        return shared is None or not shared.always

    def _in_layer(self, slot: Slot, layer: int, text: JsonObject) -> Iterator[Needed]:
        """A slot's tensors in one layer; a ragged checkpoint has its own numbers in each."""
        own = text | ragged.overrides(text, layer)
        name, shape = filled(_first(slot.name), layer=layer), self.shape(slot, own)
        if "{expert}" not in name:
            yield Needed(name, shape, slot)
            return
        count = self.evaluate(self.fields.get("experts"), own)
        if isinstance(slot, GroupSlot):
            count = slot.held[layer]
        for expert in range(count or 0):
            yield Needed(filled(name, expert=expert), shape, slot)


def _first(template: str) -> str:
    """Of an inner list the first stands for all."""
    return re.sub(r"\{i\d+\}", "0", template)


def _holds(slot: Slot, layer: int, moe: bool) -> bool:
    """Whether a layer, with experts or without, has this slot."""
    if isinstance(slot, GroupSlot):
        return layer in slot.held
    return slot.layers == "all" or slot.layers == ("moe" if moe else "dense")


@lru_cache(maxsize=1)
def words() -> Names:
    """What holds in the names of every family."""
    return Names.read((DATA / "names.json").read_text())


def is_dead(name: str) -> bool:
    """Old buffers that no class reads (rotary frequencies)."""
    return words().is_dead(name)


def families() -> dict[str, list[str]]:
    """{"moe": [...], "dense": [...]}: every model type there is data for."""
    index = json.loads((DATA / "index.json").read_text())
    return {kind: sorted(index[kind]) for kind in ("moe", "dense")}


@lru_cache(maxsize=1)
def kinds() -> dict[str, str]:
    """model type -> moe | dense."""
    known: dict[str, str] = {}
    for kind, names in families().items():
        known |= dict.fromkeys(names, kind)
    return known


def those(able: Callable[[Layout], bool]) -> str:
    """The families with experts for which this holds, for people: `a, b or c`."""
    *others, last = (n for n in families()["moe"] if able(Layout.load(n)))
    return " or ".join(filter(None, [", ".join(others), last]))


def _near(model_type: str) -> str:
    """What to do when there is no layout of this name."""
    if not model_type:
        return "the config names no model_type"
    if why := next((why for why, names in _absent().items() if model_type in names), ""):
        return f"transformers has {model_type}, and {why}"
    return did_you_mean(str(model_type), list(kinds()))


@lru_cache(maxsize=1)
def _absent() -> dict[str, list[str]]:
    """Why there is no data -> the model types of transformers that this holds for."""
    found: dict[str, list[str]] = json.loads((DATA / "absent.json").read_text())
    return found


@lru_cache(maxsize=64)
def _load(model_type: str) -> Layout:
    path = DATA / "families" / f"{model_type}.json"
    if not re.fullmatch(r"\w[\w.-]*", str(model_type)) or not path.exists():
        raise MoetoolError(
            f"no layout for model type {model_type!r}",
            expected="a family that `moetool archs list` shows",
            hint=_near(model_type),
        )
    data = json.loads(path.read_text())
    bare = data.pop("bare", None)
    overlays = json.loads((DATA / "overlay.json").read_text())
    try:
        return Layout(
            tensors=tuple(Slot(**t) for t in data.pop("tensors")),
            experts=StackedExperts(**data.pop("experts", {})),
            towers=tuple(Tower(**t) for t in data.pop("towers", ())),
            bare=None if bare is None else Bare(**bare),
            overlay=Overlay.read(overlays.get(model_type, {})),
            **data,
        )
    except TypeError as problem:
        raise MoetoolError(
            f"the layout of {model_type} is not well formed: {problem}",
            file=path,
            hint="run `python -m moetool.archs.generate` or correct overlay.json",
        ) from None
