"""From the names and shapes of a model to templates with formulas; used by `generate`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from moetool.archs.model import Shapes
from moetool.data import JsonMapping, JsonObject

WORDS: JsonObject = json.loads((Path(__file__).parent / "words.json").read_text())
LAYERS: int = WORDS["first"]["num_hidden_layers"]
HEAD = "head_dim"  # the width of an attention head, as formulas have it
_NUMBER = re.compile(r"(expert_)?(\d+)")


def role_of(template: str, kind: str = "moe") -> str | None:
    """What a tensor is for, by the patterns of words.json; None outside the text model."""
    if re.search(WORDS["elsewhere"], template):
        return None
    for role, pattern in WORDS["roles"]:
        if re.search(pattern, template) and (kind == "moe" or role.startswith("ffn")):
            return str(role)
    return None


def fields_of(text: JsonMapping) -> dict[str, str]:
    """Meaning -> the config field that carries it."""
    found = {k: next((f for f in names if f in text), None) for k, names in WORDS["fields"].items()}
    return {k: v for k, v in found.items() if v}


@dataclass(frozen=True)
class Template:
    """A name with its numbers taken out: `{layer}` of the text model's stack, `{expert}`, `{i0}`
    for any other.
    """

    name: str
    index: dict[str, int] = field(compare=False)

    @classmethod
    def of(cls, name: str, *, layered: bool = True) -> Template:
        """`a.layers.3.mlp.experts.7.w1` -> `a.layers.{layer}.mlp.experts.{expert}.w1`, 3 and 7."""
        parts = name.split(".")
        index: dict[str, int] = {}
        for i, part in enumerate(parts):
            digits = _NUMBER.fullmatch(part)
            if digits is None:
                continue
            key = "layer" if layered else f"i{len(index)}"
            if i and "expert" in parts[i - 1] + part:
                key = "expert"
            if key in index:
                key = f"i{len(index)}"
            index[key] = int(digits[2])
            parts[i] = f"{digits[1] or ''}{{{key}}}"
        return cls(".".join(parts), index)


@dataclass(frozen=True)
class Formulas:
    """Dimensions as formulas over config fields: (value in the first build, in the second) -> the
    plainest formula. A second build is absent (None) where nothing could be varied.
    """

    terms: dict[tuple[int, int | None], str]
    second: Shapes = field(default_factory=dict)  # shapes of the second build, by template
    square: tuple[str, str] | None = None  # the hidden size and all heads, where these are as wide

    @classmethod
    def of_one(cls, terms: dict[str, int]) -> Formulas:
        """From one build alone."""
        return cls({(value, None): formula for formula, value in reversed(terms.items())})

    def of_first(self) -> Formulas:
        """The same formulas, for shapes that only one build has."""
        terms: dict[tuple[int, int | None], str] = {
            (a, None): f for (a, _), f in reversed(self.terms.items())
        }
        return replace(self, terms=terms)

    def shape(self, template: str, shape: tuple[int, ...]) -> list[str | None]:
        """A shape as formulas, None for a dimension without one; the width of a head alone is one
        in layers only: a patch or a number of positions may be as wide by chance.
        """
        other: tuple[int | None, ...] = self.second.get(template, ())
        if len(other) != len(shape):
            other = (None,) * len(shape)
        found = [self._one(a, b) for a, b in zip(shape, other, strict=True)]
        layered = "{layer}" in template
        for side, pattern in enumerate(WORDS["heads"]):
            if self.square and re.search(pattern, template) and found[side] == self.square[0]:
                found[side] = self.square[1]  # where heads are as wide as they may be elsewhere
        return [one if layered or one != HEAD else None for one in found]

    def _one(self, first: int, second: int | None) -> str | None:
        found = self.terms.get((first, second))
        if found or second is not None:
            return found
        return next((f for (value, _), f in self.terms.items() if value == first), None)


def square_of(text: JsonMapping) -> tuple[str, str] | None:
    """The field of the hidden size and the formula of all heads' width, where the two are equal."""
    names = fields_of(text)
    if not {"heads", "hidden"} <= names.keys():
        return None
    terms, all_heads = terms_of(text), f"{names['heads']}*{HEAD}"
    same = terms.get(names["hidden"]) == terms.get(all_heads)
    return (names["hidden"], all_heads) if same else None


def terms_of(text: JsonMapping) -> dict[str, int]:
    """Formula -> value, the plainest formula first."""
    fields = {k: (f, text[f]) for k, f in fields_of(text).items() if type(text.get(f)) is int}
    plain = ("hidden", "width", "expert_width", "shared_width", "experts", "vocab")
    terms = {fields[k][0]: fields[k][1] for k in plain if k in fields}
    if "heads" in fields and "hidden" in fields:
        terms |= _head_terms(fields, text)
    for key in ("width", "expert_width", "shared_width"):
        if key in fields:
            terms[f"2*{fields[key][0]}"] = 2 * fields[key][1]
    if "shared_count" in fields and (per := fields.get("expert_width", fields.get("width"))):
        count = fields["shared_count"]
        terms[f"{count[0]}*{per[0]}"] = count[1] * per[1]
        terms[f"2*{count[0]}*{per[0]}"] = 2 * count[1] * per[1]
    terms["1"] = 1
    return terms


def _head_terms(fields: Mapping[str, tuple[str, int]], text: JsonMapping) -> dict[str, int]:
    heads, hidden = fields["heads"], fields["hidden"]
    head = text.get("head_dim") or hidden[1] // heads[1]
    kv = fields.get("kv_heads", heads)
    return {
        f"{heads[0]}*head_dim": heads[1] * head,
        f"{kv[0]}*head_dim": kv[1] * head,
        HEAD: head,
        f"{heads[0]}*head_dim+2*{kv[0]}*head_dim": (heads[1] + 2 * kv[1]) * head,
    }


@dataclass(frozen=True)
class Tensors:
    """The tensors of one build on disk, those in the text model's layers apart (`layered`; all
    where the family has no plain stack of layers).
    """

    disk: Shapes
    layered: frozenset[str]
    kind: str
    unsaved: str = "$^"  # a pattern of names that a class does not save
    unbound: str = "$^"  # of templates whose shapes fields do not tell
    whole: bool = True  # whether the text config is the whole

    def template(self, name: str) -> Template:
        return Template.of(name, layered=name in self.layered)

    def entries(self, formulas: Formulas) -> list[JsonObject]:
        """One entry a template: name, shape, role, and the layers that have it."""
        shapes: dict[str, set[tuple[int, ...]]] = defaultdict(set)
        layers: dict[str, set[int | None]] = defaultdict(set)
        for name, shape in self.disk.items():
            template = self.template(name)
            shapes[template.name].add(shape)
            if template.index:
                layers[template.name].add(template.index.get("layer"))
        out = []
        for name in sorted(shapes):
            outside = bool(layers[name]) and layers[name] == {None}  # a tower's own layers
            role = None if outside else role_of(name, self.kind)
            sure = bool(formulas.second) or role is not None  # one build may match by accident
            known = len(shapes[name]) == 1 and formulas.terms and sure
            beside = not self.whole and "{i" in name and "{layer}" not in name  # another's layers
            formula = formulas.shape(name, next(iter(shapes[name]))) if known else None
            if formula is not None and (beside or re.search(self.unbound, name)):
                formula = [None] * len(formula)
            entry: JsonObject = {"name": name, "shape": formula, "role": role}
            if layers[name]:
                entry["layers"] = layers[name]
            elif re.search(WORDS["may"], name) or re.search(self.unsaved, name):
                entry["layers"] = "may"
            out.append(entry)
        return out


def mark_layers(tensors: list[JsonObject], count: int | None) -> list[JsonObject]:
    """Replace the sets of layers by `all`, `moe`, `dense` or `some`."""
    experts = [t.get("layers", ()) for t in tensors if str(t["role"]).startswith("expert")]
    moe = set().union(*experts)
    every = set(range(count)) if count else None
    for tensor in tensors:
        if isinstance(tensor.get("layers"), set):
            tensor["layers"] = _mark(tensor, moe, every)
    return tensors


def _mark(tensor: JsonMapping, moe: set[int], every: set[int] | None) -> str:
    seen = tensor["layers"]
    if every and moe == every and str(tensor["role"]).startswith(("expert", "router", "shared")):
        return "moe"
    if seen == every:
        return "all"
    if seen == moe and every != moe:
        return "moe"
    return "dense" if every and seen == every - moe else "some"
