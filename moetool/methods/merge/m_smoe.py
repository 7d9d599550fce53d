"""M-SMoE."""

from __future__ import annotations

from moetool.methods.merge.way import MergeParts, MergeWay


class MSmoe(MergeWay):
    """M-SMoE (arXiv 2310.01334): the most used experts lead; each other joins the one whose router
    logits go most with its own; neurons aligned by Hungarian matching on weights,
    frequency-weighted mean. Counts are uniform here unless --budget says otherwise.
    """

    name = "m-smoe"
    parts = MergeParts("router-logits", "dominant", "frequency", "mean", align="weights")
