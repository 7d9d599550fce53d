"""The chosen, each with the weight 1."""

from __future__ import annotations

from moetool.errors import UsageError
from moetool.methods.contract import Certificate
from moetool.methods.upcycle.laws.law import RouteLaw, exact
from moetool.surgery.groups import Group


class HardWord(RouteLaw):
    """The chosen have the weight 1 each: LLaVA-MoLE."""

    name = "hard"

    def told(self, base: str, top_k: int) -> None:
        if base != "beside" and top_k != 1:
            raise UsageError(
                "--law hard gives each chosen expert the weight 1: two of them are twice the FFN",
                expected="--top-k 1",
                found=f"--top-k {top_k}",
                hint="use --top-k 1, or --law renormalised",
            )

    def certificate(self, group: Group) -> Certificate:
        return exact(group, "one of them runs")
