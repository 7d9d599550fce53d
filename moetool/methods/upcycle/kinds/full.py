"""Whole copies of the FFN, in the place of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate
from moetool.methods.options import option
from moetool.methods.upcycle import assemble
from moetool.methods.upcycle.attending import Attending
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.methods.upcycle.options import Upcycling
from moetool.surgery.groups import ACTIVATIONS, FIRST_SITE, MODEL_TYPE, Group
from moetool.surgery.reform import FORMS, Into
from moetool.surgery.route import ROUTED

FAMILY = "family"  # the activation that the FFN has


@dataclass(frozen=True)
class WholeCopies(Attending):
    """The options of whole copies."""

    activation: str = option(
        FAMILY,
        "what copies of the FFN compute with instead of the family's activation; with another the "
        "output is none of the source's function, to be trained",
        choices=(FAMILY, *ACTIVATIONS),
    )


class FullKind(ExpertKind):
    """Whole copies of the FFN with `--target moetool`, or another --key than token: for families
    that no class with experts is near to, and routes that none has.
    """

    name = "full"
    base = "gone"
    Options: ClassVar[type] = WholeCopies
    own: WholeCopies
    takes: ClassVar[tuple[str, ...]] = ("expert_map", "trunk")
    several = True
    sites = ("ffn", "attention", "mixer", "norms")

    @classmethod
    def meant(cls, said: Upcycling) -> bool:
        if said.form not in FORMS or said.site not in cls.sites:
            return False
        return said.target == MODEL_TYPE or said.key != ROUTED or said.site != FIRST_SITE

    @property
    def spelled(self) -> str:
        if self.verb.site != FIRST_SITE:
            return f"--site {self.verb.site}"
        return f"--key {self.key.name}" if self.key.name != ROUTED else f"--target {MODEL_TYPE}"

    @property
    def stands(self) -> str:
        return "member" if self.key.keeps else self.base

    def told(self) -> None:
        super().told()
        self.own.told(self.verb)
        if self.own.activation != FAMILY and self.verb.site != FIRST_SITE:
            raise UsageError(
                "an activation is a part of the FFN",
                expected=f"--site {FIRST_SITE}",
                found=f"--activation {self.own.activation} --site {self.verb.site}",
                hint="leave out --activation",
            )

    def params(self, ground: Ground) -> JsonObject:
        said, own = self.own.params(ground), self.own.activation
        return said if own == FAMILY else said | {"activation": own}

    def origin(self, sources: int) -> Sequence[int]:
        """Source of each expert."""
        return assemble.expert_map(self.verb.expert_map, self.verb.experts, 1, sources)

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        origin = self.origin(1 + len(spot.others))
        for expert, linear in spot.each():
            if not spot.group.has(linear.name):
                continue
            number = origin[expert]
            ground = (spot.ground, *spot.others)[number]
            replace(spot, ground=ground).copy(build, expert, linear, number)
        return {}

    def certificate(self, group: Group, sources: int) -> Certificate:
        if set(self.origin(sources)) != {0}:
            why = "experts come from different models: there is no single function to keep"
            return Certificate("none", why, None)
        if self.own.activation != FAMILY:
            why = f"experts compute with {self.own.activation} instead of the family's activation"
            return Certificate("none", why, None)
        return super().certificate(group, sources)
