"""No text needed: experts whose weights are alike become one. The default when there is no text."""

from __future__ import annotations

from typing import ClassVar

from moetool.methods.merge.preset import Preset


class Alike(Preset):
    """Average-linkage clusters of the experts' weights by Euclidean distance, plain mean.
    Duplicates are found and merged away.
    """

    name = "alike"
    text = False
    choices: ClassVar[dict[str, str]] = {
        "features": "weights",
        "cluster": "average",
        "weigh": "uniform",
        "combine": "mean",
        "align": "weights",
        "router": "centroid",
    }
