"""The chosen, each with a sigmoid of its own."""

from __future__ import annotations

from typing import ClassVar

from moetool.data import JsonObject
from moetool.methods.upcycle.laws.law import RouteLaw, Summed


class SigmoidWord(RouteLaw):
    """The chosen have the sigmoid of their score each: DeepSeek-V3."""

    name = "sigmoid"
    Options: ClassVar[type] = Summed
    own: Summed

    @property
    def sums(self) -> bool:  # type: ignore[override]
        return self.own.renormalise

    def options(self, hidden: int) -> JsonObject:
        return {"renormalise": True} if self.own.renormalise else {}
