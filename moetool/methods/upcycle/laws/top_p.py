"""As many as hold a share together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.options import option
from moetool.methods.upcycle.laws.law import RouteLaw, Summed


@dataclass(frozen=True)
class TopP(Summed):
    """The options of the law."""

    top_p: float = option(
        0.7, "share of the softmax that the chosen hold together", unit="share", metavar="SHARE"
    )


class TopPWord(RouteLaw):
    """As many of the best as hold the share --top-p together, at most --top-k: Huang et al., arXiv
    2403.07652.
    """

    name = "top_p"
    Options: ClassVar[type] = TopP
    own: TopP
    all_run = True

    @property
    def sums(self) -> bool:  # type: ignore[override]
        return self.own.renormalise

    def told(self, base: str, top_k: int) -> None:
        if not 0 < self.own.top_p <= 1:
            raise UsageError(
                "a share of the softmax",
                expected="--top-p above 0, at most 1",
                found=f"--top-p {self.own.top_p:g}",
                hint="for example --top-p 0.7",
            )

    def options(self, hidden: int) -> JsonObject:
        more = {"renormalise": True} if self.own.renormalise else {}
        return {"threshold": self.own.top_p, **more}
