"""Whole copies of the FFN, in the place of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate
from moetool.methods.options import option
from moetool.methods.upcycle import assemble, carve, copies
from moetool.methods.upcycle.attending import Attending
from moetool.methods.upcycle.copies import VariedCopies
from moetool.methods.upcycle.diversify import Diversify
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.methods.upcycle.options import Upcycling
from moetool.surgery import places
from moetool.surgery.groups import ACTIVATIONS, FIRST_SITE, MODEL_TYPE, Group
from moetool.surgery.reform import FORMS, Into
from moetool.surgery.route import ROUTED
from moetool.units import STRENGTH, parse_number

SOLVED = "auto"  # --scale
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

    They stand in the place of the FFN; with --shared beside it, which stays always on: at zero
    output (--scale auto: exact), or as they are times --scale. Nexus (arXiv 2408.15901).
    """

    name = "full"
    further = f"--target {MODEL_TYPE}"
    base = "gone"
    Options: ClassVar[type] = WholeCopies
    own: WholeCopies
    takes: ClassVar[tuple[str, ...]] = ("expert_map", "shared", "scale", "trunk", "diversify")
    several = True
    sites = ("ffn", "attention", "cross", "mixer", "norms", "final_norm")

    @classmethod
    def meant(cls, said: Upcycling) -> bool:
        if said.form not in FORMS or said.site not in cls.sites or said.carve in carve.BY_TEXT:
            return False
        if said.site != FIRST_SITE:
            return True
        whole = said.split == 1 or said.form == cls.name  # else kinds/parts.py
        return whole and (said.target == MODEL_TYPE or said.key != ROUTED)

    @property
    def spelled(self) -> str:
        if self.verb.site != FIRST_SITE:
            return f"--site {self.verb.site}"
        return f"--key {self.key.name}" if self.key.name != ROUTED else f"--target {MODEL_TYPE}"

    @classmethod
    def standing(cls, said: Upcycling) -> str:
        return "beside" if said.shared else cls.base

    @property
    def stands(self) -> str:
        standing = self.standing(self.verb)
        return "member" if self.key.keeps and standing == self.base else standing

    @property
    def silent(self) -> bool:
        """Whether experts start at zero output."""
        return self.verb.shared and self.verb.scale == SOLVED

    @property
    def starts(self) -> str:  # type: ignore[override]
        return "zero" if self.silent else "ffn"

    @property
    def factor(self) -> float:
        """On what experts give. UsageError where it is no number, or leaves them out for good."""
        if self.verb.scale == SOLVED:
            return 1.0
        try:
            found = parse_number(self.verb.scale, largest=STRENGTH)
        except ValueError:
            found = 0.0
        if not found:
            raise UsageError(
                f"--scale {self.verb.scale!r} is none for experts beside the FFN",
                expected=f"auto (they start at zero output), or a number up to {STRENGTH:g} but 0",
                found=self.verb.scale,
                hint="leave out --scale",
            )
        return found

    def told(self) -> None:
        super().told()
        self.own.told(self.verb)
        self._at_ffn()
        if self.verb.scale != SOLVED and not self.verb.shared:
            raise UsageError(
                "--scale is of experts beside the FFN",
                expected="--shared --scale FACTOR",
                found=f"--scale {self.verb.scale}",
                hint="leave out --scale: weights of experts in its place are the law's",
            )
        assert self.factor  # refused here

    def _at_ffn(self) -> None:
        """Refuse what other modules have not."""
        asked = {"--shared": self.verb.shared, "--diversify": self.verb.diversify != "none"}
        for word in (word for word, said in asked.items() if said):
            if self.verb.site != FIRST_SITE:
                raise UsageError(
                    f"{word} is of experts that are FFNs",
                    expected=f"--site {FIRST_SITE}",
                    found=f"{word} --site {self.verb.site}",
                    hint=f"leave out {word}",
                )
        if self.own.activation != FAMILY and self.verb.site != FIRST_SITE:
            raise UsageError(
                "an activation is a part of the FFN",
                expected=f"--site {FIRST_SITE}",
                found=f"--activation {self.own.activation} --site {self.verb.site}",
                hint="leave out --activation",
            )

    def check(self, ground: Ground) -> None:
        super().check(ground)
        if self.verb.diversify != "none":
            copies.check(ground, Diversify.parse(self.verb.diversify))

    def params(self, ground: Ground) -> JsonObject:
        said, own = self.own.params(ground), self.own.activation
        said |= {"output_scale": True} if self.silent else {}
        return said if own == FAMILY else said | {"activation": own}

    def group(self, ground: Ground) -> Group:
        made = replace(super().group(ground), scale=self.factor)
        if made.router_tensors and places.named(made.site).noun == "norm":
            raise UsageError(
                "a token has one set of a norm's weights, which no router chooses",
                expected="one expert for each modality beside text",
                found=f"--site {made.site} --experts {made.experts} --top-k {made.route.top_k}",
                hint="for example --experts 1 --top-k 1, or --allowed 100/010/001",
            )
        return made

    def origin(self, sources: int) -> Sequence[int]:
        """Source of each expert."""
        return assemble.expert_map(self.verb.expert_map, self.verb.experts, 1, sources)

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        origin = self.origin(1 + len(spot.others))
        for expert in range(spot.group.experts if self.silent else 0):
            scale = f"{spot.module}.{spot.group.expert(expert, part='output_scale')}"
            build.zeros(build.target(scale, "F32", (1,)))
        if self.verb.diversify != "none":
            VariedCopies(spot, Diversify.parse(self.verb.diversify), origin).write(build)
            return {}
        for expert, linear in spot.each():
            if not spot.group.has(linear.name):
                continue
            number = origin[expert]
            ground = (spot.ground, *spot.others)[number]
            replace(spot, ground=ground).copy(build, expert, linear, number)
        return {}

    def certificate(self, group: Group, sources: int) -> Certificate:
        if self.verb.trunk != "base":
            why = "the trunk is mixed: there is no single function to keep"
            return Certificate("none", why, None)
        if self.silent:
            return super().certificate(group, sources)
        if self.verb.shared:
            coverage = 1 + self.factor if self.combine.sums else None
            why = f"experts add {self.factor:g} times what they give to the FFN, which stays whole"
            return Certificate("none", why, coverage)
        if set(self.origin(sources)) != {0}:
            why = "experts come from different models: there is no single function to keep"
            return Certificate("none", why, None)
        if self.own.activation != FAMILY:
            why = f"experts compute with {self.own.activation} instead of the family's activation"
            return Certificate("none", why, None)
        if Diversify.parse(self.verb.diversify).changes_function:
            why = "copies were changed on purpose (noise, re-drawn neurons or a mask)"
            return Certificate("none", why, None)
        return super().certificate(group, sources)
