"""Bottleneck adapters on the FFN or the attention, one an expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.kinds.kind import OutsideKind
from moetool.surgery.groups import FIRST_SITE, Group
from moetool.surgery.inside import ADAPTER_ACTS
from moetool.surgery.reform import Into

_STARTS = ("zero", "drawn")


@dataclass(frozen=True)
class Bottleneck:
    """The options of adapters."""

    adapter_dim: int = option(64, "width of each adapter's bottleneck", WHAT, minimum=1)
    adapter_at: str = option(
        "after",
        "where adapters stand: after the FFN or attention (they change its output), or before it "
        "(its input)",
        choices=("after", "before"),
    )
    adapter_act: str = option(
        ADAPTER_ACTS[0], "what adapters compute with between down and up", choices=ADAPTER_ACTS
    )
    adapter_gated: bool = option(
        False, "adapters have a second way down, a gate: up(act(gate h) * down h), as GLUs do"
    )
    adapter_bias: bool = option(False, "adapters have biases, on their ways down and up")
    adapter_groups: int = option(
        1, "parts into which an adapter's way up is cut, as a grouped convolution", minimum=1
    )
    adapter_shared_down: bool = option(False, "all adapters of a layer share one way down")
    adapter_residual: float = option(
        1.0, "factor on what comes out of the FFN, to which adapters add; 1 alone is exact"
    )
    adapter_start: str = option(
        _STARTS[0],
        "how an adapter's way up starts: zero (exact), or drawn as the way down",
        choices=_STARTS,
    )


class AdapterKind(OutsideKind):
    """Bottleneck adapters on the FFN or the attention, one an expert: h + up(gelu(down h)) of its
    output, or of its input; up is zero at birth, so that the model is exactly its source until it
    is trained.

    PESC (arXiv 2401.02731): after the FFN, top-2, renormalised. LaVIN (arXiv 2305.15023) and PILL
    (arXiv 2311.02126): before the attention.
    """

    name = "adapter"
    Options: ClassVar[type] = Bottleneck
    own: Bottleneck

    def check(self, ground: Ground) -> None:
        own, parts = self.own, self.own.adapter_groups
        if own.adapter_dim % parts or ground.given % parts:
            raise UsageError(
                "the way up of an adapter cannot be cut into so many parts",
                expected=f"a divisor of --adapter-dim {own.adapter_dim} and of {ground.given}",
                found=f"--adapter-groups {parts}",
                hint="for example --adapter-groups 2",
            )
        if self.own.adapter_dim > ground.given:
            raise UsageError(
                "an adapter's bottleneck is wider than what goes through it",
                expected=f"--adapter-dim at most {ground.given}",
                found=f"--adapter-dim {self.own.adapter_dim}",
                hint="for example --adapter-dim 64",
            )

    def told(self) -> None:
        super().told()
        moved = self.own.adapter_residual != 1.0
        if moved and (self.verb.site != FIRST_SITE or self.own.adapter_at != "after"):
            raise UsageError(
                "--adapter-residual is of adapters behind an FFN",
                expected=f"--site {FIRST_SITE} --adapter-at after",
                found=f"--site {self.verb.site} --adapter-at {self.own.adapter_at}",
                hint="leave out --adapter-residual",
            )

    def certificate(self, group: Group, sources: int) -> Certificate:
        if self.own.adapter_start != _STARTS[0] or self.own.adapter_residual != 1.0:
            why = "adapters start at random, or add to a part of what they stand behind"
            return Certificate("none", why, None)
        return super().certificate(group, sources)

    @property
    def keeps_width(self) -> bool:
        return self.own.adapter_at == "before"

    def params(self, ground: Ground) -> JsonObject:
        own = self.own
        said: JsonObject = {"dim": own.adapter_dim}
        more = {
            "at": (own.adapter_at, "after"),
            "act": (own.adapter_act, ADAPTER_ACTS[0]),
            "gated": (own.adapter_gated, False),
            "bias": (own.adapter_bias, False),
            "groups": (own.adapter_groups, 1),
            "shared_down": (own.adapter_shared_down, False),
            "residual": (own.adapter_residual, 1.0),
        }
        return said | {name: value for name, (value, usual) in more.items() if value != usual}

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        spot.write_inside(build, drawn=self.own.adapter_start != _STARTS[0])
        return {}
