"""Dense while it learns, one expert in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Certificate
from moetool.methods.options import option
from moetool.methods.upcycle.laws.law import RouteLaw, Tempered, exact
from moetool.surgery.groups import Group


@dataclass(frozen=True)
class Gumbel(Tempered):
    """The options of the law."""

    least_weight: float = option(
        0.02, "in training an expert below this weight is left out", unit="share", metavar="SHARE"
    )
    final_weight: str = option(
        "one",
        "of the best expert, which alone runs where nothing is trained: one, or its share of the "
        "softmax",
        choices=("one", "share"),
    )


class GumbelWord(RouteLaw):
    """Dense in training, by a softmax with Gumbel noise, and otherwise the best one alone: EvoMoE,
    arXiv 2112.14397. The temperature is lowered while it is trained: give a Trainer
    `moetool.modeling.anneal.Annealing(first, last, steps)`.
    """

    name = "gumbel"
    Options: ClassVar[type] = Gumbel
    own: Gumbel

    @classmethod
    def most(cls, top_k: int, experts: int) -> int:
        return 1

    def told(self, base: str, top_k: int) -> None:
        if top_k != 1:
            raise UsageError(
                "--law gumbel ends with one expert a token",
                expected="--top-k 1",
                found=f"--top-k {top_k}",
                hint="leave out --top-k",
            )
        self.own.told(self.name)

    def options(self, hidden: int) -> JsonObject:
        own = self.own
        more = {"threshold": own.least_weight} if own.least_weight else {}
        more |= {"share": True} if own.final_weight == "share" else {}
        return {"temperature": own.temperature, **more}

    def certificate(self, group: Group) -> Certificate:
        if self.own.final_weight == "share":
            return super().certificate(group)
        return exact(
            group, "one of them runs where nothing is trained (in training, shares of several)"
        )
