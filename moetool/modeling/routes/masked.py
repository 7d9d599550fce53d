"""Routes in which a number of each token says what it may use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moetool.modeling.routes.scorer import Scorer
from moetool.modeling.signals import Heard
from moetool.surgery.groups import Group


class MaskedScorer(Scorer):
    """Subclass it in a file of this folder, and say what number each token has (`kinds`).

    options of the route: allowed [kinds][choices], who may use what; routers: `one` (`weight`
    [choices, hidden]) or `each` ([kinds * choices, hidden]) where a token has a choice.
    """

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__(group, hidden)
        said = group.route.options
        self.allowed: Sequence[Sequence[int]] = said["allowed"]
        self.each = said.get("routers") == "each"

    def kinds(self, heard: Heard, tokens: int) -> Tensor:
        """[tokens], from 0."""
        raise NotImplementedError

    def groups(self, heard: Heard, tokens: int) -> Tensor | None:
        return self.kinds(heard, tokens)

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        kinds, weight = self.kinds(heard, len(x)).to(x.device), self.held("weight")
        allowed = torch.tensor(self.allowed, dtype=torch.bool, device=x.device)[kinds]
        scores = x.new_zeros(allowed.shape)
        if weight is not None:
            scores = functional.linear(x, weight, self.held("bias"))
        if self.each:
            every = scores.view(len(x), len(self.allowed), -1)
            scores = every[torch.arange(len(x), device=x.device), kinds]
        return scores.masked_fill(~allowed, -torch.inf)
