"""Sub-MoE, with and without whitening."""

from __future__ import annotations

from dataclasses import replace

from moetool.methods.merge.way import MergeParts, MergeWay


class SubMoe(MergeWay):
    """Sub-MoE (arXiv 2506.23266): K-means on the cosine of expert outputs, two consecutive layers
    jointly; union SVD, V averaged by frequency.

    Untruncated (--rank-energy 1) the union SVD *is* the weighted mean; only truncation makes it
    another thing.
    """

    name = "sub-moe"
    parts = MergeParts("cosine", "kmeans", "frequency", "svd", joint=2)


class SubMoeWhitened(MergeWay):
    """Sub-MoE with whitening (its dagger variant): the union SVD in the space of whitened inputs,
    truncated to --rank-energy.
    """

    name = "sub-moe-whitened"
    parts = replace(SubMoe.parts, whiten=True)
