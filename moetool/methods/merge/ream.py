"""REAM."""

from __future__ import annotations

from moetool.methods.merge.way import MergeParts, MergeWay


class Ream(MergeWay):
    """REAM (arXiv 2604.04356): the experts of highest REAP saliency lead; in that order each takes
    its nearest (outputs and router logits) unassigned experts, so few groups are big and many
    experts stay alone; neurons aligned by activations, weights by saliency.
    """

    name = "ream"
    parts = MergeParts("outputs-and-logits", "ream", "saliency", "mean", align="activations")
