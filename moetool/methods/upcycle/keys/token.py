"""Each token by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.methods.options import option
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.surgery.groups import LINEAR
from moetool.surgery.route import ROUTED


@dataclass(frozen=True)
class TokenRouter:
    """The options of routers by token."""

    router_bias: bool = option(
        False, "routers add a bias, zero at birth (no class with experts has one)"
    )


class TokenKey(RouteKey):
    """Each token by itself: a linear router over what the FFN sees."""

    name = ROUTED
    sites = ("ffn", "attention", "cross", "heads", LINEAR)
    Options: ClassVar[type] = TokenRouter
    own: TokenRouter

    @property
    def bias(self) -> bool:
        return self.own.router_bias
