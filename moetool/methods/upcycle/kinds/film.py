"""Scales and shifts of the FFN's output, one pair of maps an expert."""

from __future__ import annotations

from moetool.methods.contract import Builder
from moetool.methods.upcycle.ground import Spot
from moetool.methods.upcycle.kinds.kind import OutsideKind
from moetool.surgery.reform import Into


class FilmKind(OutsideKind):
    """Feature-wise modulation of the output of the FFN or the attention, one pair of linear maps an
    expert: (1 + scale(h)) h + shift(h); both maps are zero at birth, so that the model is exactly
    its source until it is trained.

    MoFME (arXiv 2312.16610): top-2 or 4 of 4 to 16, renormalised; there in a vision model that is
    trained from scratch.
    """

    name = "film"

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        spot.write_inside(build)
        return {}
