"""HC-SMoE."""

from __future__ import annotations

from moetool.methods.merge.way import MergeParts, MergeWay


class HcSmoe(MergeWay):
    """HC-SMoE (arXiv 2410.08589): average-linkage clusters of the experts' mean outputs by
    Euclidean distance, frequency-weighted mean.

    Its published commands misspell `hierarchical` and run K-means; this is the method of the
    paper. Router rows of a cluster: its centroid's (the original keeps all rows and saves
    nothing).
    """

    name = "hc-smoe"
    parts = MergeParts("mean-outputs", "average", "frequency", "mean")
