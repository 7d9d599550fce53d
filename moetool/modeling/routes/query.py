"""The queries of attention heads: how long they are."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.modeling.routes.scorer import Scorer
from moetool.modeling.signals import Heard


class QueryScorer(Scorer):
    """No tensors: a head's score is the length of its query, before it is rotated, over the
    standard deviation among heads (MoH-LLaMA, arXiv 2410.11842).
    """

    name: ClassVar[str] = "query"
    sites: ClassVar[tuple[str, ...]] = ("heads",)

    @property
    def learns(self) -> bool:
        """The attention's own queries (MoH balances heads so)."""
        return True

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        """x: lengths [tokens, heads]."""
        return x / x.std(-1, keepdim=True, correction=0).clamp(min=1e-6)
