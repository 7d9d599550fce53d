"""Verbs and their ways as plain data: what `moetool methods` shows, and the JSON Schema of recipes.
All of it is made from the classes; nothing is written twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from moetool import methods
from moetool.data import JsonObject
from moetool.errors import UsageError, did_you_mean
from moetool.methods import measured
from moetool.methods.field import Field
from moetool.methods.options import fields as fields_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moetool.methods.reduce.way import Way

SCHEMA = "https://json-schema.org/draft/2020-12/schema"
_SIZE = r"^\s*\d+(\.\d+)?\s*([kKmMgGtT][iI]?)?[bB]?\s*$"
_SHARE = r"^\s*(\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+)\s*%?\s*$"


@dataclass(frozen=True)
class NamedWay:
    """One way of a verb, as people ask for it."""

    verb: str
    name: str
    cls: type[Way]

    @property
    def about(self) -> str:
        """Its docstring, on one line."""
        return self.cls.about()

    @property
    def line(self) -> str:
        """The first sentence."""
        return re.split(r"(?<=[^.]\.)\s", self.about, maxsplit=1)[0].rstrip(".")

    @property
    def needs_text(self) -> bool:
        """Whether it cannot do without."""
        return self.cls.needs_text()

    def as_json(self) -> JsonObject:
        """As a verb lists it."""
        return {"name": self.name, "text": self.needs_text, "about": self.about} | self.measured

    @property
    def measured(self) -> JsonObject:
        """What it keeps, and what that says of it, where it was measured."""
        known = figures()
        kl = known.of(self.verb, self.name)
        advice = known.advice(self.verb, self.name) or getattr(self.cls, "apart", "")
        return {"kl": kl, "advice": advice} if kl else {}


def ways(verb: str) -> tuple[NamedWay, ...]:
    """The ways of a verb, in name order."""
    return tuple(NamedWay(verb, name, cls) for name, cls in methods.load(verb).ways().items())


@lru_cache(maxsize=1)
def figures() -> measured.Figures:
    """What all ways were measured to keep, held against the one that is chance."""
    known = [*ways("prune"), *ways("merge")]
    chance = next(way.name for way in known if way.cls.chance)
    return measured.figures(chance, frozenset(way.name for way in known if way.cls.apart))


def every_way() -> Iterator[NamedWay]:
    """The ways of all verbs."""
    for verb in methods.METHODS:
        yield from ways(verb)


def listed() -> list[JsonObject]:
    """Every verb with a line, and a line for each of its ways."""
    return [
        {
            "name": name,
            "about": entry.about,
            "ways": [w.as_json() | {"about": w.line} for w in ways(name)],
        }
        for name, entry in methods.METHODS.items()
    ]


def describe(name: str) -> JsonObject:
    """A verb {name, about, options, examples, methods}, or a way of one {name, verb, about,
    papers, text, options, example}. UsageError with the nearest names.
    """
    if name in methods.METHODS:
        return _verb(name)
    found = [way for way in every_way() if way.name == name]
    if not found:
        known = [*methods.METHODS, *(way.name for way in every_way())]
        raise UsageError(f"no method {name!r}", hint=did_you_mean(name, known))
    return _way(found[0])


def _verb(name: str) -> JsonObject:
    cls = methods.load(name)
    found = {
        "name": name,
        "about": "\n".join(line.strip() for line in (cls.__doc__ or "").strip().splitlines()),
        "options": [_option(f) for f in cls.fields()],
        "examples": list(cls.examples),
    }
    listed = [way.as_json() for way in ways(name)]
    return found | ({"methods": listed} if listed else {})


def _way(way: NamedWay) -> JsonObject:
    text = " --calibrate TEXT" if way.needs_text else ""
    return {
        "name": way.name,
        "verb": way.verb,
        "about": way.about,
        "papers": [f"arXiv {number}" for number in re.findall(r"\d{4}\.\d{5}", way.about)],
        "text": way.needs_text,
        **way.measured,
        "options": [_option(f) for f in fields_of(way.cls.Options)],
        "example": f"moetool {way.verb} SRC OUT --method {way.name}{text}",
    }


def _option(field: Field) -> JsonObject:
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    found: JsonObject = {
        "name": field.spelled,
        "type": "list" if field.type is tuple else field.type.__name__,
        "default": default,
        "help": field.help,
        "panel": field.panel,
    }
    return found | ({"choices": list(field.choices)} if field.choices else {})


# --- the JSON Schema of a verb's recipe


def schema(verb: str) -> JsonObject:
    """JSON Schema (draft 2020-12) of a recipe of this verb."""
    cls = methods.load(verb)
    options: JsonObject = {}
    for field in cls.fields():
        options[field.spelled] = _property(field)
        if field.was:
            old = {"deprecated": True, "description": f"now {field.spelled}"}
            options[field.was.replace("_", "-")] = _property(field) | old
    empty = {"type": ["string", "null"]}
    several = {"type": ["array", "null"], "items": {"type": "string"}}
    return {
        "$schema": SCHEMA,
        "title": f"a recipe of moetool {verb}",
        "description": methods.METHODS[verb].about,
        "type": "object",
        "properties": {
            "paper": {"type": "string", "description": "where it is described"},
            "about": {"type": "string", "description": "what it does, in a sentence or two"},
            "method": {"const": verb},
            "source": empty | {"description": "the checkpoint to start from"},
            **({"from": several | {"description": cls.several}} if cls.several else {}),
            "out": empty | {"description": "the folder to write"},
            "seed": {"type": "integer", "default": 0, "description": "everything random"},
            "options": {
                "type": ["object", "null"],
                "properties": options,
                "additionalProperties": False,
            },
        },
        "required": ["method"],
        "additionalProperties": False,
    }


def _property(field: Field) -> JsonObject:
    found: JsonObject = {"description": field.help, **_type(field)}
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return found | ({"default": default} if default is not None else {})


def _type(field: Field) -> JsonObject:
    """What YAML may hold for a field."""
    ends = {"minimum": field.minimum, "maximum": field.maximum}
    least = {word: end for word, end in ends.items() if end is not None}
    if field.type is tuple and field.choices:
        each = {"enum": list(field.choices)}
        return {"anyOf": [{"type": "array", "items": each}, {"type": "string"}]}
    if field.choices:
        before = [word for word, _ in field.old]  # words of older recipes
        switches = [word == "true" for word in before if word in ("true", "false")]
        return {"enum": [*field.choices, *before, *switches]}
    if field.unit == "bytes":
        return {"anyOf": [{"type": "integer", **least}, {"type": "string", "pattern": _SIZE}]}
    if field.unit == "share":
        return {"anyOf": [{"type": "number", **least}, {"type": "string", "pattern": _SHARE}]}
    if field.type is tuple:
        return {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}
    if field.type is str:
        return {"type": ["string", "number", "array"]}
    return {"type": {bool: "boolean", int: "integer", float: "number"}[field.type], **least}
