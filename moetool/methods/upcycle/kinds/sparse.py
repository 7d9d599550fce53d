"""Sparse experts: the FFN is kept once, and each expert changes it at a few places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground
from moetool.methods.upcycle.kinds.changed import ChangeKind, OneLinear
from moetool.surgery.forms.sparse import columns, kept
from moetool.surgery.spec import Piece

if TYPE_CHECKING:
    from torch import Tensor

LARGEST, RANDOM = "largest", "random"


@dataclass(frozen=True)
class FewPlaces:
    """The options of sparse experts."""

    delta_keep: float = option(
        0.01,
        "share of each matrix's numbers that an expert changes",
        WHAT,
        unit="share",
        metavar="SHARE",
    )
    delta_places: str = option(
        LARGEST,
        "with --from: keep the largest of what changed, or some at random, larger by what makes up "
        "for the others",
        choices=(LARGEST, RANDOM),
    )


class SparseKind(ChangeKind):
    """The layer's own FFN changed at a few places, an expert: places at random and no change yet,
    so that the model is exactly its source until it is trained; or what fine-tunes changed.

    DeRS (arXiv 2503.01359): from a trained mixture 0.1 of each change at random; from one dense
    model 0.0001, trained.
    """

    name = "sparse"
    Options: ClassVar[type] = FewPlaces
    own: FewPlaces

    @property
    def kept(self) -> str:
        return f"{self.own.delta_keep * 100:.6g}% of the numbers"

    def check(self, ground: Ground) -> None:
        if not 0 < self.own.delta_keep <= 1:
            raise UsageError(
                "--delta-keep is a share of a matrix's numbers",
                expected="above 0, at most 1",
                found=f"--delta-keep {self.own.delta_keep:g}",
                hint="for example --delta-keep 1%",
            )

    def params(self, ground: Ground) -> JsonObject:
        return {"keep": self.own.delta_keep} | super().params(ground)

    def _places(self, build: Builder, one: OneLinear) -> list[Piece]:
        (out, into), stored = one.sides, one.stored
        count = kept(self.own.delta_keep, stored.shape)
        return [
            one.place(build, "delta_rows", "I32", (out + 1,)),
            one.place(build, "delta_columns", columns(into), (count,)),
            one.place(build, "delta_values", stored.dtype, (count,)),
        ]

    def changed(self, build: Builder, one: OneLinear, source: int) -> None:
        places, random = self._places(build, one), self.own.delta_places == RANDOM
        build.task(
            "sparse_change",
            one.inputs(source),
            places,
            transposed=one.linear.transposed,
            seed=one.spot.seed if random else None,
            name=places[-1].name if random else None,
        )

    def unchanged(self, build: Builder, one: OneLinear) -> None:
        rows, where, values = self._places(build, one)
        how = {"width": one.sides[1], "seed": one.spot.seed, "name": values.name}
        build.task("sparse_places", [], [rows, where], **how)
        build.task("zeros", [], [values])

    def lost(self, change: Tensor) -> float:
        from moetool.kernels import delta

        count = kept(self.own.delta_keep, tuple(change.shape))
        if self.own.delta_places == RANDOM:  # what it is on average
            return float((change.numel() / count - 1) ** 0.5)
        return delta.apart(change, delta.spread(delta.largest(change, count), change.shape[1]))
