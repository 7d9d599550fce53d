"""Dense while it learns, one expert in the end (EvoMoE's dense-to-sparse gate, arXiv 2112.14397)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moetool.modeling.laws.law import USUAL, Beside, Choices, CombineLaw
from moetool.surgery.route import Route

_LEAST = 1e-20


class GumbelLaw(CombineLaw):
    """options: temperature; threshold, below which an expert is left out.

    In training the weights are softmax((log share + Gumbel noise) / temperature), of those above
    the threshold and as they are; else the best one alone has the weight 1. The noise is drawn
    from torch's own generator, which gradient checkpointing restores.
    """

    name: ClassVar[str] = "gumbel"

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        self.temperature = float(route.options["temperature"])
        self.threshold = float(route.options.get("threshold", 0.0))

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        if not asked.training:
            return Choices(scores.topk(1, -1).indices, None)
        share = scores.float().log_softmax(-1)
        drawn = torch.rand_like(share).clamp_min(_LEAST)
        noise = -(-drawn.log()).clamp_min(_LEAST).log()
        weight = ((share + noise) / self.temperature).softmax(-1)
        runs = (weight > self.threshold) | (weight == weight.amax(-1, keepdim=True))
        every = torch.arange(weight.shape[-1], device=weight.device).expand(weight.shape)
        return Choices(every.masked_fill(~runs, -1), weight.to(scores.dtype), drops=True)
