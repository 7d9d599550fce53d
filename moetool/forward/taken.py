"""What a MoE block takes and gives, kept whole for who solves for weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moetool.forward.block import Block
from moetool.kernels import moe

Tensor = torch.Tensor


class Taken:
    """Sees a layer at work (catch.Look), and keeps what its block was given, x [tokens, hidden],
    and what its routed experts made of it, `made` [tokens, hidden]; both float32, on the device.
    """

    x: Tensor
    made: Tensor

    def begin(self, layer: int, block: Block, tokens: int) -> None:
        """Room for all tokens that will come."""
        self._seen, self._law = 0, block.law
        size = (tokens, block.router.shape[1])
        self.x = torch.empty(size, device=block.router.device)
        self.made = torch.zeros(size, device=block.router.device)

    def batch(self, file: int, x: Tensor, routing: moe.Routing) -> Callable[[moe.AtWork], None]:
        """Keep a batch's input; returns what adds up each expert's share of its output."""
        start, self._seen = self._seen, self._seen + len(x)
        self.x[start : self._seen] = x
        made = self.made[start : self._seen]

        def seen(at: moe.AtWork) -> None:
            whole = self._law.score == "sigmoid-on-input"
            made.index_add_(0, at.rows, at.out if whole else at.out * at.weight[:, None])

        return seen

    def after(self, before: Tensor, out: Tensor) -> None:
        """Not needed."""

    def end(self) -> None:
        """Everything is kept until the next layer begins."""
