"""All experts, for every token."""

from __future__ import annotations

from moetool.methods.upcycle.keys.key import RouteKey
from moetool.surgery.groups import LINEAR


class AlwaysKey(RouteKey):
    """No router: every expert runs for every token.

    Beside the FFN each is added whole (--law hard); in its place or under it they are averaged
    (--law soft), so that copies are the FFN.
    """

    name = "always"
    draws = False
    apart = False
    sites = ("ffn", "attention", LINEAR)
    laws = ("hard", "soft")

    @classmethod
    def law(cls, usual: str, base: str) -> str:
        return "hard" if base == "beside" else "soft"

    @classmethod
    def most(cls, top_k: int, experts: int) -> int:
        return experts
