"""How much the neuron that stands for an expert fires (CMoE, arXiv 2502.04416)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from moetool.modeling.routes.scorer import Scorer
from moetool.modeling.signals import Heard
from moetool.surgery.groups import Group


class NeuronsScorer(Scorer):
    """|act(gate x) * (up x)| of one neuron an expert, |act(up x)| where the FFN has no gate.
    options of the route: gated; act, the activation (silu where nothing is said).
    """

    name: ClassVar[str] = "neurons"
    sites: ClassVar[tuple[str, ...]] = ("ffn",)
    up: Tensor

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__(group, hidden)
        self.act = group.route.options.get("act", "silu")

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        gate, up = self.held("gate"), functional.linear(x, self.up)
        fires = self._act(up) if gate is None else self._act(functional.linear(x, gate)) * up
        return fires.abs()

    def _act(self, x: Tensor) -> Tensor:
        if self.act.startswith("gelu"):
            return functional.gelu(x, approximate=self.act.partition("_")[2] or "none")
        return functional.relu(x) if self.act == "relu" else functional.silu(x)
