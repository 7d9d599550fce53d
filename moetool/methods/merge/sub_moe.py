"""Sub-MoE, with and without whitening."""

from __future__ import annotations

from typing import ClassVar

from moetool.methods.merge.preset import Preset


class SubMoe(Preset):
    """Sub-MoE (arXiv 2506.23266): K-means on the cosine of expert outputs, two consecutive layers
    jointly; union SVD, V averaged by frequency.

    Untruncated (--rank-energy 1) the union SVD *is* the weighted mean; only truncation makes it
    another thing.
    """

    name = "sub-moe"
    choices: ClassVar[dict[str, str]] = {
        "features": "cosine",
        "cluster": "kmeans",
        "weigh": "frequency",
        "combine": "svd",
        "align": "none",
        "router": "centroid",
        "joint": "2",
    }


class SubMoeWhitened(Preset):
    """Sub-MoE with whitening (its dagger variant): the union SVD in the space of whitened inputs,
    truncated to --rank-energy.
    """

    name = "sub-moe-whitened"
    choices: ClassVar[dict[str, str]] = {**SubMoe.choices, "whiten": "true"}
