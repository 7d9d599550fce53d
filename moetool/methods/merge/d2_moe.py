"""D2-MoE."""

from __future__ import annotations

from typing import ClassVar

from moetool.methods.merge.preset import Preset


class D2Moe(Preset):
    """D2-MoE (arXiv 2502.17298): every expert is one shared base (frequency-weighted mean) plus a
    low-rank difference, whitened as SVD-LLM does.

    The number of experts stays; --ratio is the share of expert weights saved, which sets the rank.
    --form factored stores it that way (moetool's own form, which stock loaders refuse);
    materialised writes full matrices that load everywhere and save nothing.
    """

    name = "d2-moe"
    choices: ClassVar[dict[str, str]] = {
        "features": "outputs",
        "cluster": "average",
        "weigh": "frequency",
        "combine": "base-delta",
        "align": "none",
        "router": "centroid",
        "whiten": "true",
    }
