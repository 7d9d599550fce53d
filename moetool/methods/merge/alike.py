"""No text needed, and nothing runs: experts whose weights are alike become one."""

from __future__ import annotations

from moetool.methods.merge.way import MergeParts, MergeWay


class Alike(MergeWay):
    """Average-linkage clusters of the experts' weights by Euclidean distance, plain mean.
    Duplicates are found and merged away.
    """

    name = "alike"
    auto = "no text"
    parts = MergeParts("weights", "average", "uniform", "mean", align="weights")
