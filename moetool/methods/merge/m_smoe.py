"""M-SMoE."""

from __future__ import annotations

from typing import ClassVar

from moetool.methods.merge.preset import Preset


class MSmoe(Preset):
    """M-SMoE (arXiv 2310.01334): the most used experts lead; each other joins the one whose router
    logits go most with its own; neurons aligned by Hungarian matching on weights,
    frequency-weighted mean. Counts are uniform here unless --budget says otherwise.
    """

    name = "m-smoe"
    choices: ClassVar[dict[str, str]] = {
        "features": "router-logits",
        "cluster": "dominant",
        "weigh": "frequency",
        "combine": "mean",
        "align": "weights",
        "router": "centroid",
    }
