"""Each expert takes the tokens that it likes most (Zhou et al., arXiv 2202.09368; MoMa)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moetool.modeling.laws.law import USUAL, Beside, Choices, CombineLaw, over_sum
from moetool.modeling.signals import KEPT
from moetool.surgery.route import Route


class ExpertChoiceLaw(CombineLaw):
    """options: capacity, experts of a token on average; score (`softmax` or `sigmoid`: weights);
    renormalise, whether those of a token are divided by their sum; noise, whether logistic noise
    (Gumbel-sigmoid) is added in training; auxiliary, the width of the router part that foresees
    who takes a token.

    **Not causal**: an expert compares all tokens of a call, later ones and those of other
    sequences too, so a token alone is computed otherwise than among others. With `auxiliary`, that
    part decides where nothing is trained, for each token by itself. An expert takes capacity times
    the mean of what tokens that may use it would have: tokens / experts of each modality.
    """

    name: ClassVar[str] = "expert_choice"
    reads: ClassVar[tuple[str, ...]] = (KEPT,)

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        said = route.options
        self.capacity = float(said["capacity"])
        self.sigmoid = said.get("score") == "sigmoid"
        self.renormalise, self.noise = bool(said.get("renormalise")), bool(said.get("noise"))

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        if self.noise and asked.training:
            drawn = torch.rand_like(scores, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
            scores = scores + drawn.logit().to(scores.dtype)
        weight, may = self._weights(scores), ~scores.isneginf()
        if asked.kept is not None:
            may = may & asked.kept.to(may.device)[:, None]
        if asked.likely is None or asked.training:
            taken = self._taken(weight, may)
        else:
            taken = may & (asked.likely > 0)
        weight = weight * taken
        weight = over_sum(weight) if self.renormalise else weight
        every = torch.arange(weight.shape[-1], device=weight.device).expand(weight.shape)
        return Choices(every.masked_fill(~taken, -1), weight.to(scores.dtype), drops=True)

    def _weights(self, scores: Tensor) -> Tensor:
        return scores.float().sigmoid() if self.sigmoid else scores.float().softmax(-1)

    def _taken(self, weight: Tensor, may: Tensor) -> Tensor:
        """Which expert takes which token [tokens, choices], of those that may use it."""
        fair = may / may.sum(-1, keepdim=True).clamp(min=1)
        room = (self.capacity * fair.sum(0)).ceil()
        order = weight.masked_fill(~may, -1).argsort(dim=0, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)[:, None].expand(order.shape)
        )
        return may & (rank < room)

    def shares(self, scores: Tensor) -> Tensor:
        return over_sum(self._weights(scores))
