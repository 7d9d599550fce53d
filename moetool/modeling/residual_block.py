"""An FFN whose forward takes what stands around it too, and adds that, with groups of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moetool.modeling.block import GroupedBlock, Linear, Standin, Swapped

Tensor = torch.Tensor


class ResidualBlock(GroupedBlock):
    """The residual is added once, to what the groups give together; dropout is each FFN's own."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., hidden] twice -> [..., hidden]."""
        made = self.mix(hidden_states)
        return made if residual is None else residual + made

    def own_ffn(self, x: Tensor, linears: Mapping[str, Linear] | None = None) -> Tensor:
        """The family's own FFN of x [tokens, hidden] alone."""
        own: dict[str, Any] = {n: Standin(one, self, n) for n, one in (linears or {}).items()}
        made: Tensor = self.stock.forward(Swapped(self, own) if own else self, x, x.new_zeros(1))
        return made
