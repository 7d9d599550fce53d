"""Dense while it learns, one expert in the end (EvoMoE's dense-to-sparse gate, arXiv 2112.14397)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moetool.modeling.laws.law import USUAL, Beside, Choices, CombineLaw
from moetool.surgery.route import Route

_LEAST = 1e-20


class GumbelLaw(CombineLaw):
    """options: temperature; threshold, below which an expert is left out; hard, whether training
    runs the best one alone, too; share, whether that one keeps its share of the softmax where
    nothing is trained (else: the weight 1).

    In training the weights are softmax((log share + Gumbel noise) / temperature), of those above
    the threshold and as they are; else the best one alone runs. The noise is drawn from torch's own
    generator, which gradient checkpointing restores.
    """

    name: ClassVar[str] = "gumbel"

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        said = route.options
        self.temperature = float(said["temperature"])
        self.threshold = float(said.get("threshold", 0.0))
        self.hard, self.share = bool(said.get("hard")), bool(said.get("share"))

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        share = scores.float().log_softmax(-1)
        if not asked.training:
            best, expert = share.topk(1, -1)
            return Choices(expert, best.exp().to(scores.dtype) if self.share else None)
        drawn = torch.rand_like(share).clamp_min(_LEAST)
        noise = -(-drawn.log()).clamp_min(_LEAST).log()
        weight = ((share + noise) / self.temperature).softmax(-1)
        if self.hard:
            best, expert = weight.topk(1, -1)
            return Choices(expert, best.to(scores.dtype))
        runs = (weight > self.threshold) | (weight == weight.amax(-1, keepdim=True))
        every = torch.arange(weight.shape[-1], device=weight.device).expand(weight.shape)
        return Choices(every.masked_fill(~runs, -1), weight.to(scores.dtype), drops=True)
