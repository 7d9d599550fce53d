"""The best ones, and one that fills what their shares leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.methods.options import option
from moetool.methods.upcycle.laws.law import RouteLaw, Tempered


@dataclass(frozen=True)
class Filling(Tempered):
    """The options of the law."""

    gate_noise: float = option(
        0.0, "in training, the deviation of normal noise on scores", minimum=0
    )


class FilledWord(RouteLaw):
    """The best ones have their shares among all but the last, times the largest share; the last
    expert is always on with what that share leaves: Awaker2.5-VL, arXiv 2411.10669.
    """

    name = "filled"
    Options: ClassVar[type] = Filling
    own: Filling
    rest = 1

    @classmethod
    def most(cls, top_k: int, experts: int) -> int:
        return 1

    def told(self, base: str, top_k: int) -> None:
        self.own.told(self.name)

    def options(self, hidden: int) -> JsonObject:
        warm, noise = self.own.temperature, self.own.gate_noise
        made: JsonObject = {} if warm == 1.0 else {"temperature": warm}
        return made | ({"noise": noise} if noise else {})
