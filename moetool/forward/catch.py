"""A MoE block, computed here and seen at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from moetool.forward.batches import Batch
from moetool.forward.block import Block
from moetool.kernels import moe

Tensor = torch.Tensor
Seeing = Callable[[moe.AtWork], None]


class Look(Protocol):
    """Sees every MoE layer at work; `batch` gets real tokens only."""

    def begin(self, layer: int, block: Block, tokens: int) -> None: ...

    def batch(self, file: int, x: Tensor, routing: moe.Routing) -> Callable[[moe.AtWork], None]: ...

    def after(self, before: Tensor, out: Tensor) -> None: ...

    def end(self) -> None: ...


class Catch:
    """Stands in for a MoE block's forward: routes, runs the experts, and lets an onlooker see
    them; padding is left out.
    """

    def __init__(
        self, own: nn.Module, block: Block, look: Look | None, returns_logits: bool
    ) -> None:
        self.own, self.block, self.look = own, block, look
        self.returns_logits = returns_logits
        self.also: Callable[[Tensor], Seeing] | None = None  # another who sees the experts at work
        self.batch: Batch | None = None
        self._made: Tensor | None = None

    def __enter__(self) -> Catch:
        self._was = self.own.forward
        self.own.forward = self._forward  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self.own.forward = self._was  # type: ignore[method-assign]

    def _forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        assert self.batch is not None
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        padded = self.batch.tokens < len(flat)
        valid = torch.from_numpy(self.batch.valid).to(flat.device) if padded else None
        x = flat[valid] if valid is not None else flat
        routing = self.block.route(x)
        made = self.block.routed(x, routing, self._seeing(x, routing))
        always = self.block.always(x)
        made = made if always is None else made + always
        whole = made
        if valid is not None:
            whole = torch.zeros_like(flat)
            whole[valid] = made
        self._made = whole
        out = whole.reshape(hidden_states.shape)
        return (out, routing.logits) if self.returns_logits else out

    def _seeing(self, x: Tensor, routing: moe.Routing) -> Seeing | None:
        """What is called with each expert at work."""
        assert self.batch is not None
        eyes = [self.look.batch(self.batch.file, x, routing)] if self.look is not None else []
        eyes += [self.also(x)] if self.also is not None else []
        if len(eyes) < 2:
            return eyes[0] if eyes else None

        def both(at: moe.AtWork) -> None:
            for eye in eyes:
                eye(at)

        return both

    def after(self, out: Tensor) -> None:
        """The layer's own output, for onlookers that compare the stream before and after the block."""
        if self.look is None or self._made is None or self.batch is None:
            return
        flat = out.reshape(-1, out.shape[-1])
        valid = torch.from_numpy(self.batch.valid).to(flat.device)
        self.look.after((flat - self._made)[valid], flat[valid])
