"""Bottleneck adapters on the FFN, one an expert."""

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


@dataclass(frozen=True)
class Bottleneck:
    """The options of adapters."""

    adapter_dim: int = option(64, "width of each adapter's bottleneck", WHAT, minimum=1)
    adapter_at: str = option(
        "after",
        "where adapters stand: after the FFN (they change its output), or before it (its input)",
        choices=("after", "before"),
    )


class AdapterKind(ExpertKind):
    """Bottleneck adapters on the FFN, one an expert: h + up(gelu(down h)) of the FFN's output, or
    of its input; up is zero at birth, so that the model is exactly its source until it is trained.

    PESC (arXiv 2401.02731): after, top-2, renormalised.
    """

    name = "adapter"
    Options: ClassVar[type] = Bottleneck
    own: Bottleneck

    def check(self, ground: Ground) -> None:
        if self.own.adapter_dim > ground.given:
            raise UsageError(
                "an adapter's bottleneck is wider than what goes through it",
                expected=f"--adapter-dim at most {ground.given}",
                found=f"--adapter-dim {self.own.adapter_dim}",
                hint="for example --adapter-dim 64",
            )

    @property
    def keeps_width(self) -> bool:
        return self.own.adapter_at == "before"

    def params(self, ground: Ground) -> JsonObject:
        said: JsonObject = {"dim": self.own.adapter_dim}
        return said if self.own.adapter_at == "after" else said | {"at": self.own.adapter_at}

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        spot.write_inside(build)
        return {}
