"""All experts, each with its share of a softmax (soft mixtures)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moetool.modeling.laws.law import USUAL, Beside, Choices, CombineLaw
from moetool.surgery.route import Route


class SoftLaw(CombineLaw):
    """`top_k` of the route says nothing here. options: temperature."""

    name: ClassVar[str] = "soft"
    sums = True

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        self.temperature = float(route.options.get("temperature", 1.0))

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        every = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
        return Choices(every, self.shares(scores).to(scores.dtype))

    def shares(self, scores: Tensor) -> Tensor:
        return (scores.float() / self.temperature).softmax(-1)
