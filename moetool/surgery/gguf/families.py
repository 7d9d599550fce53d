"""The families that llama.cpp knows, and where each of their tensors goes (archs/gguf.json, strict:
an unknown key is an error).

names: slot of the family's layout -> the tensor's name there, or [name, turn, numbers ...] where it
lies otherwise (kernels/turn.py), or several of those, or null where llama.cpp has no place for it.
fields: [key, kind, formula]. must: config fields that llama.cpp cannot be told, with the values
that it takes for granted; equal: those that must be as large as others. warns: fields that it
ignores, with what to say. note: what is said of every such file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.family import filled
from moetool.surgery.layout import DATA, Layout, Matched
from moetool.surgery.text_model import TextModel

SAME = ("same",)


@dataclass(frozen=True)
class Place:
    """A tensor of a GGUF file that a family's tensor goes to, whole or as the slab of one expert,
    and how it is turned.
    """

    name: str
    turn: tuple[Any, ...] = SAME
    expert: int | None = None

    @classmethod
    def read(cls, said: Any) -> tuple[Place, ...]:
        """One entry of `names`."""
        if said is None:
            return ()
        if isinstance(said, str):
            return (cls(said),)
        if isinstance(said[0], str):
            return (cls(said[0], tuple(said[1:])),)
        return tuple(cls(s[0], tuple(s[1:])) for s in said)


@dataclass(frozen=True)
class Dialect:
    """One family as llama.cpp knows it."""

    arch: str
    names: Mapping[str, Any] = field(default_factory=dict)
    fields: Sequence[Sequence[str]] = ()
    must: Mapping[str, list[Any]] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    warns: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def with_usual(self, usual: JsonObject) -> Dialect:
        """What all families share, where this one says nothing else."""
        rows = {row[0]: row for row in (*usual["fields"], *self.fields)}
        return replace(
            self,
            names=usual["names"] | dict(self.names),
            fields=tuple(rows.values()),
            must=usual["must"] | dict(self.must),
        )

    def places(self, at: TextModel, matched: Matched) -> tuple[Place, ...]:
        """Where a tensor goes; nothing where llama.cpp has no place for it."""
        slot = matched.slot
        said = self.names.get(slot.name, self.names.get(str(slot.role)))
        return tuple(_placed(at, p, matched) for p in Place.read(said))


def _placed(at: TextModel, place: Place, matched: Matched) -> Place:
    text, (word, *numbers) = at.text, place.turn
    turn = (word, *(at.layout.evaluate(n, text) for n in numbers))
    if None in turn:
        raise MoetoolError(
            "the config does not say how a tensor is to be turned for llama.cpp",
            tensor=matched.slot.name,
            expected=", ".join(map(str, numbers)),
            hint="restore the config from the original model",
        )
    return Place(filled(place.name, layer=matched.layer), turn, matched.expert)


@lru_cache(maxsize=1)
def families() -> dict[str, Dialect]:
    """model type -> what llama.cpp calls its things."""
    data = json.loads((DATA / "gguf.json").read_text())
    return {n: Dialect(**f).with_usual(data["usual"]) for n, f in data["families"].items()}


def family(at: TextModel, whole: str = "") -> Dialect:
    """The family of a text model; MoetoolError where llama.cpp's names for it are not known.
    `whole`: the family of the checkpoint that the text model is a part of.
    """
    name = at.layout.model_type
    if name not in families() or at.prefix:
        name = (at.prefix and whole) or name
        raise MoetoolError(
            f"how llama.cpp names the tensors of {name} is not known to moetool",
            expected=", ".join(sorted(families())),
            found=name,
            hint="llama.cpp's own convert_hf_to_gguf.py may know the family; other formats of "
            "`moetool quantize` do",
        )
    found = families()[name]
    _check(found, at.layout, at.text)
    return found


def _check(found: Dialect, layout: Layout, text: JsonObject) -> None:
    """Refuse a config that llama.cpp would compute otherwise."""
    other = {n: layout.evaluate(o, text) for n, o in found.equal.items()}
    taken = dict(found.must) | {n: [o] for n, o in other.items()}
    for name, values in taken.items():
        value = layout.evaluate(name, text) if name in other else text.get(name, values[0])
        if value not in values:
            raise MoetoolError(
                f"llama.cpp computes {layout.model_type} as if {name} were "
                f"{' or '.join(map(str, values))}",
                expected=values[0],
                found=value,
                hint="choose another format: a GGUF file of this model would answer otherwise",
            )


def warnings(found: Dialect, text: JsonObject) -> list[str]:
    """What llama.cpp leaves aside of this config, in sentences."""
    said = [say.format(value=text[n]) for n, say in found.warns.items() if text.get(n)]
    return [*said, *filter(None, [found.note])]
