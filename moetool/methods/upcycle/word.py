"""Words of the grammar of upcycling (`--form`, `--key`, `--law`, ...): a class in a file each."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import ClassVar, TypeVar

from moetool import discover
from moetool.methods.several import Nothing

Kind = TypeVar("Kind", bound="Word")


class Word:
    """What all have: the first sentence of the docstring describes it, `Options` are its own.
    `asked`: the option that asks for it, where that is not its axis and name; `further`: what must
    be said beside its name, where that alone means something else.
    """

    name: ClassVar[str] = ""
    asked: ClassVar[str] = ""
    further: ClassVar[str] = ""
    Options: ClassVar[type] = Nothing

    @classmethod
    def about(cls) -> str:
        """Its docstring on one line."""
        return " ".join((cls.__doc__ or "").split())

    @classmethod
    def line(cls) -> str:
        """The first words of it."""
        return cls.about().partition(":")[0].partition(",")[0]


def words(base: type[Kind]) -> Mapping[str, type[Kind]]:
    """name -> class, of all files beside the one of `base`, in name order."""
    if base not in _FOUND:
        folder = import_module(base.__module__.rpartition(".")[0])
        _FOUND[base] = dict(discover.classes(folder, base))
    found: Mapping[str, type[Kind]] = _FOUND[base]  # type: ignore[assignment]
    return found


_FOUND: dict[type[Word], dict[str, type[Word]]] = {}


def listed(base: type[Word]) -> str:
    """Every word with what it is, for a help."""
    return "; ".join(f"{name}: {word.line()}" for name, word in words(base).items())
