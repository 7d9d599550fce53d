"""The best experts, and one that is always on and fills what their shares leave (Awaker2.5-VL,
arXiv 2411.10669).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moetool.modeling.laws.law import USUAL, Beside, Choices, CombineLaw
from moetool.surgery.route import Route


class FilledLaw(CombineLaw):
    """options: temperature of the softmax; noise, the deviation of what is added to scores in
    training.

    The router scores all experts but the last. With w the largest share, the chosen have their
    share times w (as its code multiplies twice), and the last one, which is nobody's choice, 1 - w.
    """

    name: ClassVar[str] = "filled"

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        self.temperature = float(route.options.get("temperature", 1.0))
        self.noise = float(route.options.get("noise", 0.0))

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        heard = scores.float()
        if self.noise and asked.training:
            heard = heard + torch.randn_like(heard) * self.noise
        best, expert = self.shares(heard).topk(self.top_k, -1)
        most = best[:, :1]
        weight = torch.cat((best * most, 1 - most), -1)
        last = expert.new_full((len(expert), 1), scores.shape[-1])
        return Choices(torch.cat((expert, last), -1), weight.to(scores.dtype), counted=expert)

    def shares(self, scores: Tensor) -> Tensor:
        return (scores.float() / self.temperature).softmax(-1)
