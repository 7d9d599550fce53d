"""Experts of a few bits a weight: the FFN is kept once, and each expert's change of it is rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder, Decisions, Settings
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground
from moetool.methods.upcycle.kinds.changed import ChangeKind, OneLinear
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.forms.compressed_tensors import scaled_by
from moetool.surgery.forms.kbit import MOST, levels
from moetool.surgery.spec import Piece

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FewBits:
    """The options of experts whose change is rounded."""

    delta_bits: int = option(2, f"bits of each number that changed, 1 to {MOST}", WHAT, minimum=1)
    delta_group: int = option(
        64, "inputs that share a scale of what changed; 0: a whole row", minimum=0
    )


class KbitKind(ChangeKind):
    """The layer's own FFN and what a fine-tune changed in it in a few bits a weight, an expert; it
    is not trained.

    DeRS (arXiv 2503.01359): 1 or 2 bits.
    """

    name = "kbit"
    Options: ClassVar[type] = FewBits
    own: FewBits

    @property
    def kept(self) -> str:
        return f"{self.own.delta_bits} bit{'s' if self.own.delta_bits > 1 else ''}"

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        if len(sources) == 1:
            raise UsageError(
                f"{self.spelled} holds what fine-tunes changed",
                expected="--from FINE-TUNE, once or more",
                found="no --from",
                hint="give fine-tunes, or use --form sparse, which can be trained from nothing",
            )
        return super().decide(sources, settings)

    def check(self, ground: Ground) -> None:
        own = self.own
        if own.delta_bits > MOST:
            raise UsageError(
                "a change in more bits than there are formats for",
                expected=f"--delta-bits 1 to {MOST}",
                found=f"--delta-bits {own.delta_bits}",
                hint="for example --delta-bits 4",
            )
        for linear in ground.linears:
            into = linear.sides(ground.stored(linear, ground.layers[0]).shape)[1]
            if own.delta_group and into % own.delta_group:
                raise UsageError(
                    f"the inputs of {linear.name} cannot be cut into groups",
                    expected=f"--delta-group that divides {into}",
                    found=f"--delta-group {own.delta_group}",
                    hint="for example --delta-group 32, or 0 for one scale a row",
                )

    def params(self, ground: Ground) -> JsonObject:
        group = self.own.delta_group
        said: JsonObject = {"bits": self.own.delta_bits} | ({"group": group} if group else {})
        return said | super().params(ground)

    def _places(self, build: Builder, one: OneLinear) -> list[Piece]:
        (out, into), own = one.sides, self.own
        words = -(-into * own.delta_bits // 32)
        groups = into // own.delta_group if own.delta_group else 1
        return [
            one.place(build, "delta_packed", "I32", (out, words)),
            one.place(build, "delta_scale", scaled_by(one.stored.dtype), (out, groups)),
        ]

    def changed(self, build: Builder, one: OneLinear, source: int) -> None:
        build.task(
            "coded_change",
            one.inputs(source),
            self._places(build, one),
            transposed=one.linear.transposed,
            bits=self.own.delta_bits,
            group=self.own.delta_group,
            scale=scaled_by(one.stored.dtype),
        )

    def unchanged(self, build: Builder, one: OneLinear) -> None:
        for place in self._places(build, one):
            build.task("zeros", [], [place])

    def lost(self, change: Tensor) -> float:
        from moetool.kernels import delta, rounding

        grid = levels(self.own.delta_bits, self.own.delta_group)
        return delta.apart(change, rounding.values(delta.coded(change, grid), grid))
