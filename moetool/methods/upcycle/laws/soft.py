"""All experts, each with its share."""

from __future__ import annotations

from typing import ClassVar

from moetool.data import JsonObject
from moetool.methods.upcycle.laws.law import RouteLaw, Tempered


class SoftWord(RouteLaw):
    """All experts run for every token, each with its share of the softmax."""

    name = "soft"
    Options: ClassVar[type] = Tempered
    own: Tempered
    sums = True
    all_run = True

    def told(self, base: str, top_k: int) -> None:
        self.own.told(self.name)

    def options(self, hidden: int) -> JsonObject:
        warm = self.own.temperature
        return {} if warm == 1.0 else {"temperature": warm}
