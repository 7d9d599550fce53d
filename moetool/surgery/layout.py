"""What a family's checkpoint looks like: names, shapes, roles and config fields, read from the
data in archs/.

Nothing here imports torch or transformers. Templates write the layer as `{layer}` and the expert
as `{expert}`; a shape is a list of formulas over config fields ("2*moe_intermediate_size").
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from moetool.errors import MoetoolError, did_you_mean

DATA = Path(__file__).resolve().parent.parent / "archs"
_NUMBER = re.compile(
    r"(?:(?<=\.)|(?<=\.expert_)|^)\d+(?=\.|$)"
)  # a part that is a number, or expert_7 (Switch, NLLB)
# Names that stand in old files and hold nothing a model reads.
_DEAD = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$")


@dataclass(frozen=True)
class Slot:
    """One kind of tensor. `layers`: all | moe | dense | some (or None outside layers); `when`:
    only with this config.
    """

    name: str
    shape: list[str | None] | None
    role: str | None = None
    layers: str | None = None
    when: str | None = None


@dataclass(frozen=True)
class Found:
    """A name of a checkpoint, recognised."""

    slot: Slot
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Overlay:
    """What transformers cannot tell about a family (archs/overlay.json)."""

    law: dict[str, Any] = field(
        default_factory=dict
    )  # score, renorm, groups, bias, scale, zero, least_sum, act: see experts.Mixture.law
    sites: dict[str, Any] | None = None
    shared: dict[str, Any] | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    layouts: list[str] | None = None
    extra_layers: str | None = None
    gate_up: str = "concatenated"
    note: str = ""


@dataclass(frozen=True)
class Layout:
    """One family. Made by `Layout.load`; every key of the data file is a field here, an unknown
    key is an error.
    """

    model_type: str
    cls: str
    kind: str
    text_config: str
    fields: dict[str, str]
    aliases: dict[str, str]
    defaults: dict[str, Any]
    tied: dict[str, str]
    tensors: tuple[Slot, ...]
    experts: dict[str, Any] = field(default_factory=dict)
    overlay: Overlay = field(default_factory=Overlay)

    @classmethod
    def load(cls, model_type: str) -> Layout:
        """The layout of a model type; MoetoolError with the nearest names when there is none."""
        return _load(model_type)

    @cached_property
    def _by_form(self) -> dict[str, tuple[Slot, list[str]]]:
        return {
            re.sub(r"\{\w+\}", "#", slot.name): (slot, re.findall(r"\{(\w+)\}", slot.name))
            for slot in self.tensors
        }

    def match(self, name: str) -> Found | None:
        """Which slot a tensor name fills, in which layer, for which expert; None for a name the
        family does not know.
        """
        numbers: list[int] = []

        def note(found: re.Match[str]) -> str:
            numbers.append(int(found[0]))
            return "#"

        slot, keys = self._by_form.get(_NUMBER.sub(note, name), (None, []))
        if slot is None:
            return None
        index = dict(zip(keys, numbers, strict=False))
        return Found(slot, index.get("layer"), index.get("expert"))

    def fused(self) -> dict[str, str]:
        """{"gate_up": template, "down": template} of the stacked form [experts, 2*width, hidden];
        empty where there is none.

        Only forms whose expert slabs are plain rows: gate above up, not transposed, not
        interleaved.
        """
        if (
            self.experts.get("is_transposed")
            or not self.experts.get("is_concatenated")
            or not self.experts.get("has_gate")
            or self.overlay.gate_up != "concatenated"
        ):
            return {}
        on_disk = {r: self.role(f"expert.{r}") for r in ("gate_up", "down")}
        if on_disk["gate_up"] is not None and on_disk["down"] is not None:
            return {r: s.name for r, s in on_disk.items() if s}
        names = {
            r: next((m for m in self.experts.get("memory", ()) if m.endswith(f"{r}_proj")), None)
            for r in ("gate_up", "down")
        }
        return {r: n for r, n in names.items() if n} if all(names.values()) else {}

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

    def text(self, config: dict[str, Any]) -> dict[str, Any]:
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

    def field(self, meaning: str, config: dict[str, Any]) -> Any:
        """The value of a config field by meaning (`experts`, `top_k`, `layers`, ...), or None."""
        name = self.fields.get(meaning)
        return self.text(config).get(name) if name else None

    def evaluate(self, formula: str | None, text: dict[str, Any]) -> int | None:
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

    def _dimension(self, name: str, text: dict[str, Any]) -> int | None:
        value = text.get(name)
        if name == "head_dim" and not isinstance(value, int):
            hidden, heads = (
                text.get(self.fields.get("hidden", "")),
                text.get(self.fields.get("heads", "")),
            )
            value = hidden // heads if hidden and heads else None
        if name == self.fields.get("kv_heads") and value is None:
            value = text.get(self.fields.get("heads", ""))
        return value if isinstance(value, int) else None

    def shape(self, slot: Slot, text: dict[str, Any]) -> tuple[int | None, ...] | None:
        """A slot's shape under a config, None where it cannot be told."""
        return None if slot.shape is None else tuple(self.evaluate(f, text) for f in slot.shape)

    def moe_layers(self, config: dict[str, Any]) -> set[int]:
        """Which layers hold experts, as the config says."""
        count = self.field("layers", config) or 0
        text, sites = self.text(config), self.overlay.sites or {}
        every = set(range(count))
        if self.kind != "moe":
            return set()
        if "dense_list" in sites:
            step = text.get(sites["step"]) or 1
            return {
                i
                for i in every
                if i not in (text.get(sites["dense_list"]) or ()) and (i + 1) % step == 0
            }
        if "list" in sites:
            listed = text.get(sites["list"])
            step = text.get(sites["step"]) or 1
            return (
                set(listed)
                if isinstance(listed, list)
                else {i for i in every if (i + 1) % step == 0}
            )
        if "dense_prefix" in sites:
            return {i for i in every if i >= (text.get(sites["dense_prefix"]) or 0)}
        if "period" in sites:
            period, offset = (text.get(f) for f in sites["period"])
            return {i for i in every if i % (period or 1) == (offset or 0)}
        if "types" in sites and isinstance(text.get(sites["types"]), list):
            return {i for i, kind in enumerate(text[sites["types"]]) if kind == "sparse"}
        if "range" in sites:
            start, end, step = (text.get(f) for f in sites["range"])
            end = count - 1 if end in (None, -1) else end
            return {i for i in every if (start or 0) <= i <= end and (i + 1) % (step or 1) == 0}
        return every

    def present(self, slot: Slot, text: dict[str, Any]) -> bool:
        """Whether a conditional slot exists under this config."""
        if slot.when is None:
            return True
        name, _, value = slot.when.partition("=")
        return bool(text.get(name) == json.loads(value))

    def slots(
        self, config: dict[str, Any]
    ) -> Iterator[tuple[str, tuple[int | None, ...] | None, Slot]]:
        """Every (name, shape, slot) a checkpoint with this config must hold; slots of `some`
        layers are left out.
        """
        text = self.text(config)
        layers, moe = range(self.field("layers", config) or 0), self.moe_layers(config)
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        for slot in self.tensors:
            if (
                not self.present(slot, text)
                or slot.layers == "some"
                or (tied and slot.name in self.tied)
            ):
                continue
            shape = self.shape(slot, text)
            if (
                shape
                and 0 in shape
                and str(slot.role).startswith("shared.")
                and not (self.overlay.shared or {}).get("always")
            ):
                continue
            template = re.sub(
                r"\{i\d+\}", "0", slot.name
            )  # of an inner list the first stands for all
            if slot.layers is None:
                yield template, shape, slot
                continue
            for layer in layers:
                if (slot.layers == "moe") > (layer in moe) or (
                    slot.layers == "dense" and layer in moe
                ):
                    continue
                name = template.replace("{layer}", str(layer))
                own = text | (text.get("per_layer_config") or {}).get(
                    str(layer), {}
                )  # a ragged checkpoint
                here = shape if own == text else self.shape(slot, own)
                if "{expert}" in name:
                    yield from (
                        (name.replace("{expert}", str(e)), here, slot)
                        for e in range(own.get(self.fields.get("experts", "")) or 0)
                    )
                else:
                    yield name, here, slot


@dataclass(frozen=True)
class TextModel:
    """The part of a checkpoint that is a text model: its layout, the config to read with it, the
    prefix of its names, and the path to the fields inside the whole config.
    """

    layout: Layout
    config: dict[str, Any]
    prefix: str = ""
    path: tuple[str, ...] = ()


def text_model(config: dict[str, Any]) -> TextModel:
    """Where the text model of this config is described: the family itself, or the family of a
    multimodal model's text part.
    """
    layout = Layout.load(str(config.get("model_type")))
    text = config.get("text_config") or {}
    inner = text.get("model_type") or ("llama" if layout.model_type == "llava" else None)
    if (
        layout.kind == "dense"
        and inner
        and (layout.model_type == "llava" or not layout.text_config or inner in families()["moe"])
    ):
        return TextModel(Layout.load(inner), text, "language_model.", ("text_config",))
    return TextModel(layout, config, "", tuple(filter(None, layout.text_config.split("."))))


def is_dead(name: str) -> bool:
    """Old buffers that no class reads (rotary frequencies)."""
    return bool(_DEAD.search(name))


def families() -> dict[str, list[str]]:
    """{"moe": [...], "dense": [...]}: every model type there is data for."""
    index = json.loads((DATA / "index.json").read_text())
    return {kind: sorted(index[kind]) for kind in ("moe", "dense")}


@lru_cache(maxsize=64)
def _load(model_type: str) -> Layout:
    path = DATA / "families" / f"{model_type}.json"
    if not re.fullmatch(r"[\w-]+", str(model_type)) or not path.exists():
        known = [m for kinds in families().values() for m in kinds]
        raise MoetoolError(
            f"no layout for model type {model_type!r}",
            expected="a family that `moetool archs list` shows",
            hint=did_you_mean(str(model_type), known)
            if model_type
            else "the config names no model_type",
        )
    data = json.loads(path.read_text())
    overlays = json.loads((DATA / "overlay.json").read_text())
    try:
        slots = tuple(Slot(**t) for t in data.pop("tensors"))
        return Layout(tensors=slots, overlay=Overlay(**overlays.get(model_type, {})), **data)
    except TypeError as problem:
        raise MoetoolError(
            f"the layout of {model_type} is not well formed: {problem}",
            file=path,
            hint="run `python -m moetool.archs.generate` or correct overlay.json",
        ) from None
