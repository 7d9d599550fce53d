"""Experts that do nothing."""

from __future__ import annotations

from moetool.methods.contract import Builder
from moetool.methods.upcycle.ground import Spot
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.surgery.reform import Into


class NullKind(ExpertKind):
    """Experts without tensors, whose output is zero, beside the FFN: a router alone, which learns
    where another group would be left out.
    """

    name = "null"
    base = "beside"
    starts = "zero"

    @property
    def keeps_width(self) -> bool:
        return True

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        return {}
