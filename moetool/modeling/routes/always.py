"""Nothing is looked at: all experts, for every token."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.modeling.routes.scorer import Scorer
from moetool.modeling.signals import Heard


class AlwaysScorer(Scorer):
    """No router: equal scores, of which the law takes all."""

    name: ClassVar[str] = "always"

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        return x.new_zeros(len(x), self.choices)
