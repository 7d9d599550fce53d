"""MergeMoE; the default when there is text."""

from __future__ import annotations

from moetool.methods.merge.way import MergeParts, MergeWay


class MergeMoe(MergeWay):
    """MergeMoE (arXiv 2510.14436): clusters of similar outputs, gate and up averaged by frequency,
    down solved by least squares so that the layer's output stays. Here all down matrices of a
    layer are solved together, against the full layer, layers below already merged.
    """

    name = "mergemoe"
    auto = "text"
    solves = True
    parts = MergeParts("outputs", "ream", "saliency", "least-squares", align="activations")
