"""The first token of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.methods.upcycle.keys.token import TokenRouter


@dataclass(frozen=True)
class SequenceRouter(TokenRouter):
    """The options of the key."""

    patch: int = option(
        0,
        "so many tokens, one after the other, choose together, by all of them beside each other; "
        "0: the first token for all of the sequence",
        minimum=0,
    )


class SequenceKey(RouteKey):
    """The first token of a sequence, as [CLS] is: what the FFN or the attention sees of it chooses
    experts for all of the sequence; with --patch each run of so many tokens chooses for itself
    (UoE, arXiv 2503.02495), whose first tokens see its last ones: not causal.
    """

    name = "sequence"
    apart = False
    sites = ("ffn", "attention")
    Options: ClassVar[type] = SequenceRouter
    own: SequenceRouter

    @property
    def bias(self) -> bool:
        return self.own.router_bias

    def options(self, ground: Ground, choices: int, top_k: int) -> JsonObject:
        return {"patch": self.own.patch} if self.own.patch else {}
