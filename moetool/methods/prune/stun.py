"""Structured, then unstructured: fewer experts, and zeros in those that stay."""

from __future__ import annotations

import numpy as np

from moetool.methods.prune.router_distance import RouterDistance
from moetool.methods.reduce.view import View

OUTLIER = 5.0  # times the layer's mean score: what OWL calls an outlier weight
SPREAD = 0.08  # how far a layer's share may lie from the mean (OWL's lambda)


class Stun(RouterDistance):
    """STUN (arXiv 2409.06211): router-distance clusters down to --ratio, then Wanda (arXiv
    2306.11695) inside the kept experts until --total-sparsity of all expert weights is gone or
    zero, spread over layers by OWL (arXiv 2310.05175): layers with more outliers keep more.
    """

    name = "stun"
    text = True

    def outliers(self, view: View) -> float:
        """Share of a layer's weights whose |w| sqrt(input energy) is above OUTLIER times the mean."""
        import torch

        experts, found, total = view.block.experts, 0, 0
        for e in range(view.experts):
            for matrix, energy in (
                (experts.gate_up[e], view.seen.in_sq[e]),
                (experts.down[e], view.seen.mid_sq[e]),
            ):
                score = matrix.float().abs() * torch.from_numpy(np.sqrt(energy)).float()[
                    None, :
                ].to(matrix.device)
                found += int((score > OUTLIER * score.mean()).sum())
                total += score.numel()
        return found / total


def shares(outliers: dict[int, float], ratio: float, total: float) -> dict[int, float]:
    """{layer: share of the kept experts' weights to zero} so that, with `ratio` of experts gone,
    `total` of all weights are gone or zero.
    """
    base = 1.0 - (1.0 - total) / (1.0 - ratio)
    low, high = min(outliers.values()), max(outliers.values())
    if high == low:
        return dict.fromkeys(outliers, base)
    spread = {n: (v - low) / (high - low) * 2 * SPREAD for n, v in outliers.items()}
    mean = sum(spread.values()) / len(spread)
    return {n: min(0.99, max(0.0, base - (v - mean))) for n, v in spread.items()}
