"""The chosen, each with the weight 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Certificate
from moetool.methods.options import option
from moetool.methods.upcycle.laws.law import INSIDE, RouteLaw, exact
from moetool.surgery.groups import Group
from moetool.surgery.route import STRAIGHT

_OFF = "none"


@dataclass(frozen=True)
class Straight:
    """The options of the law."""

    straight: str = option(
        _OFF,
        "in training, how a gradient goes straight through the choice to the router: none; chosen "
        "(to the scores of the chosen); all (every expert runs for it: MoH); balance (through what "
        "the balance loss counts: LLaVA-MoLE)",
        choices=(_OFF, *STRAIGHT),
    )


class HardWord(RouteLaw):
    """The chosen have the weight 1 each: LLaVA-MoLE."""

    name = "hard"
    Options: ClassVar[type] = Straight
    own: Straight

    @property
    def learns(self) -> bool:  # type: ignore[override]
        """Whether a router is trained through the choice."""
        return self.own.straight != _OFF

    def told(self, base: str, top_k: int) -> None:
        if base not in ("beside", INSIDE) and top_k != 1:
            raise UsageError(
                "--law hard gives each chosen expert the weight 1: two of them are twice the FFN",
                expected="--top-k 1",
                found=f"--top-k {top_k}",
                hint="use --top-k 1, or --law renormalised",
            )

    def options(self, hidden: int) -> JsonObject:
        return {"straight": self.own.straight} if self.learns else {}

    def certificate(self, group: Group) -> Certificate:
        return exact(group, "one of them runs")
