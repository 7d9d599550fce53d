"""What a law of a route is: one class in one file of this folder; it shows up by itself.

Nothing heavy is imported here: `--help` reads all laws.
"""

from __future__ import annotations

from typing import Any, ClassVar

from moetool.data import JsonObject
from moetool.methods.contract import Certificate
from moetool.methods.upcycle.word import Word
from moetool.surgery import places
from moetool.surgery.groups import Group


class RouteLaw(Word):
    """Subclass it in a file of this folder; the first sentence of its docstring describes it.
    `sums`: whether the weights of a token always sum to one; `all_run`: whether every expert may
    run for a token, where nothing is said.
    """

    sums: ClassVar[bool] = False
    all_run: ClassVar[bool] = False

    def __init__(self, own: Any = None) -> None:
        self.own: Any = own if own is not None else self.Options()

    def told(self, base: str, top_k: int) -> None:
        """Refuse what does not go together."""

    def options(self, hidden: int) -> JsonObject:
        """What the config says of it, for tokens of this width."""
        return {}

    def certificate(self, group: Group) -> Certificate:
        """How experts that all start as the FFN, in its place, relate to it."""
        if self.sums:
            return exact(group, "the combine weights sum to one")
        why = f"under --law {self.name} the weights of the chosen experts do not sum to one"
        return Certificate("none", why, None)


def exact(group: Group, why: str) -> Certificate:
    """Whatever the router says."""
    starts = f"every expert starts as the {places.named(group.site).noun}"
    return Certificate("exact", f"{starts} and {why}, whatever the router says")
