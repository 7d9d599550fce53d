"""Parts of the FFN: neurons that matter to the same tokens, those that matter to most in one that
always runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from moetool.errors import UsageError
from moetool.methods.contract import Builder, Decisions, Settings
from moetool.methods.upcycle import carve
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.kinds.carved import CarvedKind, TextShown
from moetool.methods.upcycle.options import AUTO
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import Group
from moetool.surgery.route import ROUTED
from moetool.surgery.spec import Piece, whole
from moetool.units import STRENGTH, parse_number


class ImportantKind(CarvedKind):
    """Parts of the FFN with --carve importance: what goes into it on --calibrate is clustered, an
    expert a cluster, whose centre is the expert's row of the router; it gets the neurons that
    matter to these tokens by |h * gradient of the loss|, and those that matter to most always run.
    LLaMA-MoE v2 (arXiv 2411.15708).
    """

    name = "important"
    asked = f"--carve {carve.IMPORTANCE}"
    carving = carve.IMPORTANCE
    law = "renormalised"
    looks = ""
    Options: ClassVar[type] = TextShown
    own: TextShown
    takes: ClassVar[tuple[str, ...]] = (*CarvedKind.takes, "scale")

    def told_route(self) -> None:
        if self.key.name != ROUTED or self.key.bias:
            raise self.wrong("--key token, whose rows are centres", f"--key {self.key.name}")
        if self.verb.router != AUTO:
            raise self.wrong("no --router: it is the clusters' centres", self.verb.router)
        self.factor  # noqa: B018

    @property
    def factor(self) -> float:
        """On the sum of the routed experts."""
        if self.verb.scale == AUTO:
            return 1.0
        try:
            return parse_number(self.verb.scale, largest=STRENGTH)
        except ValueError:
            raise UsageError(
                f"--scale {self.verb.scale!r} is not understood",
                expected=f"auto or a number of at most {STRENGTH:g}",
                hint="leave it out: 1",
            ) from None

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Send the text up and its loss's gradient down, and cut each layer's FFN on the way."""
        from moetool.methods.upcycle import mattering

        ground = self.ground(sources[0])
        self.check(ground)
        cut = mattering.Parting(self.verb.split, self.own.carve_shared, settings.seed)
        return mattering.decide(ground, cut, self.own.text, settings)

    def told_by(self, found: Decisions) -> tuple[str, ...]:
        self.found = found
        return tuple(found.report.get("warnings", ()))

    def group(self, ground: Ground) -> Group:
        return replace(super().group(ground), scale=self.factor)

    def router(self, build: Builder, spot: Spot) -> Piece | None:
        number = len(self.found.extra) - 1
        centres = self.found.extra[number].tensor(carve.centres_name(spot.layer))
        return whole(centres, 1 + number)
