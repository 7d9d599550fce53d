"""Each token by itself."""

from __future__ import annotations

from moetool.methods.upcycle.keys.key import RouteKey
from moetool.surgery.route import ROUTED


class TokenKey(RouteKey):
    """Each token by itself: a linear router over what the FFN sees."""

    name = ROUTED
    sites = ("ffn", "attention", "heads", "linear")
