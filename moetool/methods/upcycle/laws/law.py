"""What a law of a route is: one class in one file of this folder; it shows up by itself.

Nothing heavy is imported here: `--help` reads all laws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Certificate
from moetool.methods.options import option
from moetool.methods.upcycle.word import Word
from moetool.surgery import places
from moetool.surgery.groups import Group

INSIDE = "inside"  # where experts stand that are parts of the FFN


class RouteLaw(Word):
    """Subclass it in a file of this folder; the first sentence of its docstring describes it.
    `sums`: whether the weights of a token always sum to one; `all_run`: whether every expert may
    run for a token, where nothing is said; `apart`: whether it looks at each token's own scores;
    `mends`: what ends a warning that it compares tokens; `rest`: how many experts, the last ones,
    are always on; `learns`: whether an option of it is how a router is trained.
    """

    sums: bool = False
    all_run: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    mends: ClassVar[str] = ""
    rest: ClassVar[int] = 0
    learns: bool = False

    def __init__(self, own: Any = None) -> None:
        self.own: Any = own if own is not None else self.Options()

    @classmethod
    def most(cls, top_k: int, experts: int) -> int:
        """Experts of a token, where nothing is said and so many are usual."""
        return experts if cls.all_run else min(top_k, experts)

    def told(self, base: str, top_k: int) -> None:
        """Refuse what does not go together."""

    def options(self, hidden: int) -> JsonObject:
        """What the config says of it, for tokens of this width."""
        return {}

    def warned(self, group: Group) -> Iterator[str]:
        """What whoever runs it must know beforehand."""
        route, choices = group.route, group.choices
        if note := route.note(choices):
            yield note + (self.mends if route.compares(choices) else "")

    def certificate(self, group: Group) -> Certificate:
        """How experts that all start as the FFN, in its place, relate to it."""
        if self.sums:
            return exact(group, "the combine weights sum to one")
        why = f"under --law {self.name} the weights of the chosen experts do not sum to one"
        return Certificate("none", why, None)


@dataclass(frozen=True)
class Summed:
    """The option of laws whose weights may sum to anything."""

    renormalise: bool = option(False, "divide the weights of a token by their sum")


@dataclass(frozen=True)
class Tempered:
    """The option of laws with a temperature."""

    temperature: float = option(
        1.0, "scores are divided by it before the softmax; a lower one is nearer to one expert"
    )

    def told(self, law: str) -> None:
        """Refuse one that has no softmax."""
        if self.temperature <= 0:
            raise UsageError(
                f"--temperature {self.temperature:g} has no softmax",
                expected="a number above 0",
                found=f"--law {law} --temperature {self.temperature:g}",
                hint="for example --temperature 0.3",
            )


def exact(group: Group, why: str) -> Certificate:
    """Whatever the router says."""
    starts = f"every expert starts as the {places.named(group.site).noun}"
    return Certificate("exact", f"{starts} and {why}, whatever the router says")
