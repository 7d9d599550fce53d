"""How near a token is to the domain of each expert (Nexus, arXiv 2408.15901)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from moetool.modeling.routes.scorer import Scorer
from moetool.modeling.signals import Heard
from moetool.surgery.groups import Group


class DomainScorer(Scorer):
    """Rows of a router that a SwiGLU MLP makes of the domains' embeddings (`domains` [choices,
    dim], which are not trained): a new expert needs an embedding, not a row.
    """

    name: ClassVar[str] = "domain"
    sites: ClassVar[tuple[str, ...]] = ("ffn",)
    domains: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__(group, hidden)
        self.domains.requires_grad_(False)

    def rows(self) -> Tensor:
        """[choices, hidden]: what an ordinary router would hold."""
        gate = functional.silu(functional.linear(self.domains, self.gate))
        middle = gate * functional.linear(self.domains, self.up)
        return functional.linear(middle, self.down)

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        return functional.linear(x, self.rows())
