"""What a way of rounding is: a class in a file of this folder, found by itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from moetool import discover
from moetool.data import JsonObject
from moetool.methods.several import Nothing

if TYPE_CHECKING:
    from moetool.methods.contract import Decisions, Settings
    from moetool.methods.quantize.choice import Choice
    from moetool.methods.quantize.options import Quantizing
    from moetool.surgery.checkpoint import Checkpoint


@dataclass(frozen=True)
class ToRound:
    """What is to be rounded: a model, the format of each matrix, and how to work."""

    source: Checkpoint
    choice: Choice
    settings: Settings


class Rounding:
    """A way of rounding. `text`: it needs text. `rounding`: how the plan's tasks round what the way
    did not solve for (see `forms.encoded`); empty: to the nearest level.
    """

    name: ClassVar[str] = ""
    text: ClassVar[bool] = False
    Options: ClassVar[type] = Nothing

    def __init__(self, verb: Quantizing, own: Any = None) -> None:
        self.verb = verb
        self.own: Any = own if own is not None else self.Options()

    @classmethod
    def known(cls) -> Mapping[str, type[Rounding]]:
        """name -> way."""
        from moetool.methods import quantize

        return discover.classes(sys.modules[quantize.__name__], Rounding)

    @classmethod
    def about(cls) -> str:
        """Its docstring on one line."""
        return " ".join((cls.__doc__ or "").split())

    @classmethod
    def needs_text(cls) -> bool:
        """Whether it cannot do without text."""
        return cls.text

    @property
    def rounding(self) -> JsonObject:
        return {}

    def decide(self, job: ToRound) -> Decisions:
        """What is solved before the plan (`extra`: a source whose matrices already have their
        forms, under the names of the output); by default nothing.
        """
        from moetool.methods.contract import Decisions

        return Decisions()
