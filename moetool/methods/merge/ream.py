"""REAM."""

from __future__ import annotations

from typing import ClassVar

from moetool.methods.merge.preset import Preset


class Ream(Preset):
    """REAM (arXiv 2604.04356): the experts of highest REAP saliency lead; in that order each takes
    its nearest (outputs and router logits) unassigned experts, so few groups are big and many
    experts stay alone; neurons aligned by activations, weights by saliency.
    """

    name = "ream"
    choices: ClassVar[dict[str, str]] = {
        "features": "outputs-and-logits",
        "cluster": "ream",
        "weigh": "saliency",
        "combine": "mean",
        "align": "activations",
        "router": "centroid",
    }
