"""The first token of a sequence."""

from __future__ import annotations

from typing import ClassVar

from moetool.methods.upcycle.keys.key import RouteKey
from moetool.methods.upcycle.keys.token import TokenRouter


class SequenceKey(RouteKey):
    """The first token of a sequence, as [CLS] is: what the FFN or the attention sees of it chooses
    experts for all of the sequence.
    """

    name = "sequence"
    apart = False
    sites = ("ffn", "attention")
    Options: ClassVar[type] = TokenRouter
    own: TokenRouter

    @property
    def bias(self) -> bool:
        return self.own.router_bias
