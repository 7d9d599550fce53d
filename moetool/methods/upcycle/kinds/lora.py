"""Low-rank experts: the FFN is kept once, and each expert changes it by B A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.surgery.reform import Into
from moetool.surgery.spec import whole


@dataclass(frozen=True)
class LowRank:
    """The options of low-rank experts."""

    rank: int = option(16, "rank of each expert's change", WHAT, minimum=1)
    alpha: float | None = option(
        None, "the change is B A times alpha / rank; twice the rank where it is not said"
    )


class LowRankKind(ExpertKind):
    """Low-rank experts over the layer's own FFN, which all of them share: A is drawn, B is zero, so
    that the model is exactly its source until it is trained.

    LLaVA-MoLE (arXiv 2401.16160): top-1, hard. MixLoRA (arXiv 2404.15159): top-2, renormalised.
    """

    name = "lora"
    Options: ClassVar[type] = LowRank
    own: LowRank

    @property
    def alpha(self) -> float:
        return 2.0 * self.own.rank if self.own.alpha is None else self.own.alpha

    def check(self, ground: Ground) -> None:
        most = min(ground.hidden, ground.width)
        if self.own.rank > most:
            raise UsageError(
                "the rank is larger than the matrices are wide",
                expected=f"--rank at most {most}",
                found=f"--rank {self.own.rank}",
                hint="for example --rank 16",
            )

    def params(self, ground: Ground) -> JsonObject:
        return {"rank": self.own.rank, "alpha": self.alpha}

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        ground, rank = spot.ground, self.own.rank
        for expert, linear in spot.each():
            stored = ground.stored(linear, spot.layer)
            out, into = linear.sides(stored.shape)
            a = build.target(spot.name(expert, linear, "lora_A"), stored.dtype, (rank, into))
            build.task("draw", [], [whole(a)], law="kaiming", seed=spot.seed, name=a.name)
            build.zeros(
                build.target(spot.name(expert, linear, "lora_B"), stored.dtype, (out, rank))
            )
        return {}
