"""Verbs that do their work in one of several ways, each a class in a file of its own, with its own
options.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar

from moetool.errors import UsageError
from moetool.methods.contract import Method
from moetool.methods.field import Field, Value
from moetool.methods.options import build
from moetool.methods.options import fields as fields_of


@dataclass(frozen=True)
class Nothing:
    """The options of a way that has none."""


@dataclass(frozen=True)
class Split:
    """What was told to a verb, and what of it belongs to the way that acts. `words`: for every
    further option that names a word with options of its own (`--key`), that word and these.
    """

    options: Any
    acting: type[Any]
    own: Any
    words: Mapping[str, tuple[type[Any], Any]] = field(default_factory=dict)


class Several(Method):
    """A verb with ways. `way` acts; it has `own` options."""

    verb: ClassVar[str]
    chooser: ClassVar[str] = "method"  # the option that names the way
    way: Any

    @classmethod
    def fields(cls) -> tuple[Field, ...]:
        own = chain.from_iterable(_own(*axis) for axis in cls.axes().items())
        return (*fields_of(cls.Options), *own)

    @classmethod
    def axes(cls) -> Mapping[str, Mapping[str, type[Any]]]:
        """Options that name words with options of their own, first the chooser -> the words."""
        return {cls.chooser: cls.ways()}

    @classmethod
    def words(cls, options: Any) -> Mapping[str, type[Any]]:
        """The word that each further one of these options means."""
        return {}

    @classmethod
    def named(cls, options: Any) -> type[Any]:
        """The way that the chooser means."""
        raise NotImplementedError

    @classmethod
    def acting(cls, options: Any) -> type[Any]:
        """The way that runs: by default the named one."""
        return cls.named(options)

    @classmethod
    def split(cls, given: Mapping[str, object]) -> Split:
        """Options of any origin as the verb's and the way's; UsageError for what fits neither, or
        belongs to another way.
        """
        known = {f.name: f for f in cls.fields()}
        given = {key.replace("-", "_"): value for key, value in given.items()}
        theirs = {k: v for k, v in given.items() if k in known and known[k].of}
        mine = {k: v for k, v in given.items() if k not in theirs}
        options: Any = build(cls.Options, mine, cls.verb)
        acting = {cls.chooser: cls.acting(options), **cls.words(options)}
        own: dict[str, dict[str, object]] = {axis: {} for axis in acting}
        for key, value in theirs.items():
            axis = next(a for a, words in cls.axes().items() if key in _names(words.values()))
            if key in _names([acting[axis]]):
                own[axis][key] = value
            elif known[key].read(value) != known[key].default:
                owner, chosen = (
                    _asked(axis, cls.axes()[axis], known[key].of),
                    getattr(options, axis),
                )
                if chosen in known[key].of:
                    owner += f" {getattr(cls.axes()[axis][chosen], 'further', '')}"
                raise _stranger(known[key], owner, f"--{axis} {chosen}", value)
        made = {a: (word, build(word.Options, own[a], cls.verb)) for a, word in acting.items()}
        way, told = made.pop(cls.chooser)
        return Split(options, way, told, made)

    def recorded(self) -> dict[str, Value]:
        return super().recorded() | told(self.way.own)


def told(own: Any) -> dict[str, Value]:
    """The options of a way by their names."""
    return {f.name: getattr(own, f.name) for f in fields_of(type(own))}


def _own(axis: str, words: Mapping[str, type[Any]]) -> Iterator[Field]:
    """The options of an axis's words; one that several words have stands once."""
    found: dict[str, Field] = {}
    for name, word in words.items():
        for one in fields_of(word.Options):
            of = (*found[one.name].of, name) if one.name in found else (name,)
            found[one.name] = replace(one, of=of)
    for one in found.values():
        yield replace(one, help=f"with {_asked(axis, words, one.of)}: {one.help}")


def _asked(axis: str, words: Mapping[str, type[Any]], of: Iterable[str]) -> str:
    """How these words are asked for: `--form lora or ternary`, or as one of them says (`asked`)."""
    said = {name: getattr(words[name], "asked", "") for name in of}
    plain = " or ".join(name for name, other in said.items() if not other)
    both = [f"--{axis} {plain}" if plain else "", *dict.fromkeys(said.values())]
    return " or ".join(filter(None, both))


def _names(words: Iterable[type[Any]]) -> set[str]:
    return {f.name for f in chain.from_iterable(fields_of(word.Options) for word in words)}


def _stranger(field: Field, owner: str, chosen: str, value: Any) -> UsageError:
    said = f"--{field.spelled} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
    return UsageError(
        f"--{field.spelled} and {owner} belong together",
        expected=f"{owner} {said}",
        found=f"{chosen} {said}",
        hint="use both or neither",
    )
