"""Ternary experts beside the FFN."""

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
from moetool.surgery.spec import Piece, whole

CODES = 4  # a byte, along the input
INT8 = "int8"


@dataclass(frozen=True)
class Ternaries:
    """The options of ternary experts."""

    exact: bool = option(
        False, "start every expert at zero output, so that the model is exactly its source", WHAT
    )
    scale_group: int = option(
        0, "inputs that share a scale, for example 128; 0: one scale a matrix", minimum=0
    )
    activations: str = option(
        "float",
        "what experts compute with: the activations as they are, or rounded to int8 a token",
        choices=("float", INT8),
    )


class TernaryKind(ExpertKind):
    """Ternary experts at two bits a weight beside the FFN, which stays whole: each starts as the
    FFN rounded to -1, 0 and 1 times its mean magnitude, behind its share of the router's softmax.

    MoTE (arXiv 2506.14435): top-1, and the FFN frozen.
    """

    name = "ternary"
    Options: ClassVar[type] = Ternaries
    own: Ternaries
    base = "beside"
    law = "softmax"
    top_k = 1

    @property
    def starts(self) -> str:  # type: ignore[override]
        return "zero" if self.own.exact else "near"

    def check(self, ground: Ground) -> None:
        group = self.own.scale_group
        for linear in ground.block.linears:
            stored = ground.stored(linear, ground.layers[0])
            into = linear.sides(stored.shape)[1]
            if into % CODES or (group and (into % group or group % CODES)):
                raise UsageError(
                    f"{linear.name} cannot be packed, {CODES} codes a byte along its input",
                    expected=f"an input width divisible by {group or CODES}",
                    found=into,
                    hint="leave out --scale-group"
                    if group and not into % CODES
                    else "--form lora has no such limit",
                )

    def params(self, ground: Ground) -> JsonObject:
        own = self.own
        said: JsonObject = {"group": own.scale_group} if own.scale_group else {}
        said |= {"activations": INT8} if own.activations == INT8 else {}
        return said | ({"output_scale": True} if own.exact else {})

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        into, places = dict[str, Into](), dict[str, list[Piece]]()
        for expert, linear in spot.each():
            stored, params = spot.ground.stored(linear, spot.layer), {"group": self.own.scale_group}
            name = spot.name(expert, linear, "weight")
            places.setdefault(linear.name, []).append(
                whole(build.target(name, stored.dtype, stored.shape))
            )
            into[name] = Into(self.name, params | {"transposed": linear.transposed})
            spot.copy_bias(build, expert, linear)
            if self.own.exact and linear is spot.block.last:
                scale = f"{spot.module}.{spot.group.expert(expert, part='output_scale')}"
                build.zeros(build.target(scale, "F32", (1,)))
        for linear in spot.block.linears:  # rounded once for all experts
            matrix = whole(spot.ground.stored(linear, spot.layer))
            build.task("repeat", [matrix], places[linear.name])
        return into
