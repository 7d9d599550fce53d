"""Attention heads of which each token has its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Builder, Certificate
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.methods.upcycle.options import Upcycling
from moetool.surgery.groups import PART, Group
from moetool.surgery.reform import FORMS, Into

HALF = -1


@dataclass(frozen=True)
class Heads:
    """The options of such experts."""

    shared_heads: int = option(
        HALF, "heads that always run, the first ones; -1: half of them", WHAT
    )
    active_heads: int = option(
        0,
        "of the other heads, how many run for a token; 0: all, which is exact "
        "at birth with --law hard",
        WHAT,
    )


class HeadsKind(ExpertKind):
    """The heads of the attention with --site heads: some always run, of the others the best for
    each token, by their queries (--key query) or by a router.
    """

    name = "heads"
    asked = "--site heads"
    Options: ClassVar[type] = Heads
    own: Heads
    law = "hard"
    top_k = 1
    sites = ("heads",)

    @classmethod
    def meant(cls, said: Upcycling) -> bool:
        return said.form == cls.name or (said.site == "heads" and said.form in FORMS)

    def told(self) -> None:
        super().told()
        usual = min(self.top_k, self.verb.experts)
        if self.verb.experts != Upcycling.experts or self.verb.top_k != usual:
            raise UsageError(
                "--experts and --top-k do nothing with --site heads",
                expected="--shared-heads and --active-heads",
                found=f"--experts {self.verb.experts} --top-k {self.verb.top_k}",
                hint="the other heads are the experts",
            )

    def check(self, ground: Ground) -> None:
        query, last = ground.block.linears
        heads, layer = self.heads(ground), ground.layers[0]
        wide = query.sides(ground.stored(query, layer).shape)[0]
        if wide % heads or wide != last.sides(ground.stored(last, layer).shape)[1]:
            raise MoetoolError(
                "the queries are not those of the heads",
                tensor=ground.stored(query, layer).name,
                expected=f"a row for each number of {heads} heads",
                found=f"{wide} rows",
                hint=f"see `moetool archs show {ground.at.layout.model_type}`",
            )
        shared, active = self._shared(heads), self.own.active_heads
        routed = heads - shared
        if not 0 <= shared < heads or not 0 <= active <= routed:
            raise UsageError(
                "--shared-heads and --active-heads do not fit",
                expected=f"of {heads} heads, at least one that is not shared",
                found=f"--shared-heads {shared} --active-heads {active}",
                hint=f"for example --shared-heads {heads // 2}",
            )

    def heads(self, ground: Ground) -> int:
        """How many there are. MoetoolError where the config does not say it."""
        found = ground.at.field("heads")
        if not isinstance(found, int) or found < 1:
            raise MoetoolError(
                "the config does not say how many heads there are",
                file=f"{ground.source.folder}/config.json",
                expected=ground.at.layout.fields.get("heads", "a number of heads"),
                found=found,
                hint="choose another --site",
            )
        return found

    def _shared(self, heads: int) -> int:
        return heads // 2 if self.own.shared_heads == HALF else self.own.shared_heads

    def group(self, ground: Ground) -> Group:
        heads = self.heads(ground)
        shared = self._shared(heads)
        routed = heads - shared
        active = self.own.active_heads or routed
        made = super().group(ground)
        return replace(
            made,
            form=PART,
            experts=routed,
            params={"shared": shared} if shared else {},
            route=replace(made.route, top_k=active),
            scale=float(active) if self.combine.sums else 1.0,
        )

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        return {}

    def certificate(self, group: Group, sources: int) -> Certificate:
        if group.route.top_k < group.experts:
            return Certificate("none", "a token does without some heads", None)
        if group.route.law == "hard":
            return Certificate("exact", "all heads run, each with the weight 1")
        if self.combine.sums and self.first_router.law == "zero" and group.router_tensors:
            return Certificate(
                "exact", "all heads run, and under a router of zero each counts once"
            )
        return Certificate("none", "heads are weighted", None)
