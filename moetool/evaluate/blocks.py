"""FFN against MoE block on random activations, in float32, one matrix in memory at a time;
transformers is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.layout import Layout, text_model
from moetool.surgery.spec import Piece, Stored, whole

TOKENS = 32


@dataclass(frozen=True)
class Error:
    """One layer: largest difference, relative to the largest dense output; coverage is sum over
    experts of w * scale.
    """

    layer: int
    relative: float
    coverage: float


@dataclass(frozen=True)
class Side:
    """One model seen as layers: its layout, the part of the config that speaks of text, its name
    prefix.
    """

    checkpoint: Checkpoint
    layout: Layout
    config: dict[str, Any]
    prefix: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Side:
        at = text_model(checkpoint.config)
        return cls(checkpoint, at.layout, at.config, at.prefix)

    def stored(self, role: str, layer: int, expert: int | None = None) -> Stored | None:
        slot = self.layout.role(role)
        return self._named(slot.name, layer, expert) if slot else None

    def _named(self, template: str, layer: int, expert: int | None = None) -> Stored | None:
        return self.checkpoint.tensors.get(
            self.prefix + template.replace("{layer}", str(layer)).replace("{expert}", str(expert))
        )

    def tensor(self, piece: Piece) -> Any:
        """A piece as float32."""
        return self.checkpoint.matrix(piece).float()

    def whole(self, stored: Stored) -> Any:
        return self.tensor(whole(stored))

    def expert(self, layer: int, expert: int) -> Iterator[Any]:
        """gate, up, down of one expert, from either layout."""
        stacked = {r: self._named(t, layer) for r, t in self.layout.fused().items()}
        if stacked.get("gate_up") and stacked.get("down"):
            both, down = stacked["gate_up"], stacked["down"]
            assert both and down
            _, double, hidden = both.shape
            slab = double * hidden
            yield self.tensor(Piece(both.name, (double // 2, hidden), expert * slab))
            yield self.tensor(Piece(both.name, (double // 2, hidden), expert * slab + slab // 2))
            yield self.tensor(Piece(down.name, down.shape[1:], expert * slab // 2))
            return
        for role in ("gate", "up", "down"):
            stored = self.stored(f"expert.{role}", layer, expert)
            assert stored is not None
            yield self.whole(stored)


def compare(source: Checkpoint, out: Checkpoint, *, seed: int = 0) -> Iterator[Error]:
    """One Error a MoE layer. Every layer's FFN is read alone: memory is one block's widest
    matrices.
    """
    import torch

    from moetool.kernels import moe

    dense, sparse = Side.of(source), Side.of(out)
    act = moe.activation(_act(sparse))
    for layer in sorted(sparse.layout.moe_layers(sparse.config)):
        gate, up, down = _dense(dense, layer)
        x = torch.randn(
            TOKENS, gate.shape[1], generator=torch.Generator().manual_seed(seed + layer)
        )
        expected = moe.ffn(x, gate, up, down, act)
        del gate, up, down
        weights = _weights(sparse, layer, x)
        made = _shared(sparse, layer, x, act)
        for expert in range(weights.shape[1]):
            if weights[:, expert].any():
                made = made + weights[:, expert : expert + 1] * _run(
                    x, sparse.expert(layer, expert), act
                )
        yield Error(
            layer,
            float((made - expected).abs().max() / expected.abs().max().clamp_min(1e-30)),
            float(weights.sum(-1).mean()),
        )


def _run(x: Any, matrices: Iterator[Any], act: Any) -> Any:
    from moetool.kernels import moe

    gate, up, down = matrices
    return moe.ffn(x, gate, up, down, act)


def _act(side: Side) -> str:
    text = side.layout.text(side.config)
    return str(text.get("hidden_act") or text.get("hidden_activation") or "silu")


def _dense(side: Side, layer: int) -> tuple[Any, Any, Any]:
    both = side.stored("ffn.gate_up", layer)
    down = side.stored("ffn.down", layer)
    assert down is not None
    if both is not None:
        gate, up = side.whole(both).chunk(2)
        return gate, up, side.whole(down)
    gate, up = side.stored("ffn.gate", layer), side.stored("ffn.up", layer)
    assert gate is not None and up is not None
    return side.whole(gate), side.whole(up), side.whole(down)


def _weights(side: Side, layer: int, x: Any) -> Any:
    from moetool.kernels import moe

    router, bias = side.stored("router", layer), side.stored("router.bias", layer)
    assert router is not None
    text, law = side.layout.text(side.config), side.layout.overlay.law
    field = side.layout.fields.get("renorm", "")
    renorm = law["renorm"] == "always" or (law["renorm"] == "field" and bool(text.get(field)))
    scale = float(text.get(side.layout.fields.get("routed_scale", ""), 1.0) or 1.0)
    return moe.route(
        x,
        side.whole(router),
        score=law["score"],
        renorm=renorm,
        top_k=int(side.layout.field("top_k", side.config)),
        scale=scale,
        bias=side.whole(bias) if bias else None,
    )


def _shared(side: Side, layer: int, x: Any, act: Any) -> Any:
    import torch

    from moetool.kernels import moe

    gate, up, down, switch = (
        side.stored(f"shared.{r}", layer) for r in ("gate", "up", "down", "switch")
    )
    if gate is None or up is None or down is None or not down.shape[1]:
        return torch.zeros_like(x)
    made = moe.ffn(x, side.whole(gate), side.whole(up), side.whole(down), act)
    return made * torch.sigmoid(x @ side.whole(switch).T) if switch is not None else made
