"""Verbs that do their work in one of several ways, each a class in a file of its own, with its own
options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """What was told to a verb, and what of it belongs to the way that acts."""

    options: Any
    acting: type[Any]
    own: Any


class Several(Method):
    """A verb with ways. `way` acts; it has `own` options."""

    verb: ClassVar[str]
    chooser: ClassVar[str] = "method"  # the option that names the way
    way: Any

    @classmethod
    def fields(cls) -> tuple[Field, ...]:
        own = (fields_of(way.Options, (name,)) for name, way in cls.ways().items())
        theirs = (
            replace(f, help=f"with --{cls.chooser} {' or '.join(f.of)}: {f.help}")
            for f in chain.from_iterable(own)
        )
        return (*fields_of(cls.Options), *theirs)

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
        acting = cls.acting(options)
        own = {}
        for key, value in theirs.items():
            if key in {f.name for f in fields_of(acting.Options)}:
                own[key] = value
            elif known[key].read(value) != known[key].default:
                raise cls._stranger(known[key], getattr(options, cls.chooser), value)
        return Split(options, acting, build(acting.Options, own, cls.verb))

    def recorded(self) -> dict[str, Value]:
        own = {f.name: getattr(self.way.own, f.name) for f in fields_of(type(self.way.own))}
        return super().recorded() | own

    @classmethod
    def _stranger(cls, field: Field, chosen: str, value: Any) -> UsageError:
        owner, chooser = " or ".join(field.of), cls.chooser
        return UsageError(
            f"--{field.spelled} and --{chooser} {owner} belong together",
            expected=f"--{chooser} {owner} --{field.spelled} {value}",
            found=f"--{chooser} {chosen} --{field.spelled} {value}",
            hint="use both or neither",
        )
