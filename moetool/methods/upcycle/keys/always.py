"""All experts, for every token."""

from __future__ import annotations

from moetool.errors import UsageError
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.methods.upcycle.laws.law import INSIDE, RouteLaw
from moetool.surgery.groups import LINEAR


class AlwaysKey(RouteKey):
    """No router: every expert runs for every token.

    Beside the FFN, or as parts of it, each is added whole (--law hard); in its place or under it
    they are averaged (--law soft), so that copies are the FFN.
    """

    name = "always"
    draws = False
    apart = False
    sites = ("ffn", "attention", "cross", LINEAR)
    laws = ("hard", "soft")

    def told(self, site: str, law: RouteLaw) -> None:
        super().told(site, law)
        if law.learns:
            raise UsageError(
                "--straight trains a router, and --key always has none",
                expected="--key always without --straight",
                found="--key always --straight",
                hint="leave out --straight",
            )

    @classmethod
    def law(cls, usual: str, base: str) -> str:
        return "hard" if base in ("beside", INSIDE) else "soft"

    @classmethod
    def most(cls, top_k: int, experts: int) -> int:
        return experts
