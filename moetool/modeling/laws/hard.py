"""The best k, each with the weight 1 (LLaVA-MoLE)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moetool.modeling.laws.law import USUAL, Beside, Choices, CombineLaw
from moetool.surgery.route import Route


class HardLaw(CombineLaw):
    """options: straight, how a gradient goes straight through the choice in training, as if the
    weights 0 and 1 were shares of the softmax: to the chosen alone (`chosen`); to all, which run
    for it (`all`: MoH, arXiv 2410.11842); or through what is counted in the balance loss
    (`balance`: the code of LLaVA-MoLE). Without it the model's loss gives the router no gradient,
    and the balance loss does. What is computed is the same.
    """

    name: ClassVar[str] = "hard"

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        self.through = route.options.get("straight", "")
        self.counts_straight = self.through == "balance"
        self.idle = any(not any(row) for row in route.options.get("allowed", ()))
        self.sums = self.top_k == 1 and self.through not in ("chosen", "all") and not self.idle

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        found, best = scores.topk(self.top_k, -1)
        if self.idle:  # tokens of a kind that has no experts
            return Choices(best.masked_fill(found.isneginf(), -1), None, drops=True)
        if self.sums or not asked.training or self.through not in ("chosen", "all"):
            return Choices(best, None)
        share = self.shares(scores)
        if self.through == "chosen":
            mine = share.gather(-1, best)
            return Choices(best, straight(torch.ones_like(mine), mine).to(scores.dtype))
        every = torch.arange(share.shape[-1], device=share.device).expand(share.shape)
        weight = straight(torch.zeros_like(share).scatter(-1, best, 1.0), share)
        every = every.masked_fill(scores.isneginf(), -1)
        return Choices(every, weight.to(scores.dtype), drops=True, counted=best)


def straight(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of one with the gradient of the other."""
    return hard + (soft - soft.detach())
