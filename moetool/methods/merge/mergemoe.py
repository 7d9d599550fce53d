"""MergeMoE; the default when there is text."""

from __future__ import annotations

from typing import ClassVar

from moetool.methods.merge.preset import Preset


class MergeMoe(Preset):
    """MergeMoE (arXiv 2510.14436): clusters of similar outputs, gate and up averaged by frequency,
    down solved by least squares so that the layer's output stays. Here all down matrices of a
    layer are solved together, against the full layer, layers below already merged.
    """

    name = "mergemoe"
    choices: ClassVar[dict[str, str]] = {
        "features": "outputs",
        "cluster": "ream",
        "weigh": "saliency",
        "combine": "least-squares",
        "align": "activations",
        "router": "centroid",
    }
