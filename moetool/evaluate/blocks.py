"""FFN against MoE block on random activations, in float32, with one expert in memory at a time;
transformers is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.text_model import TextModel, text_model

if TYPE_CHECKING:
    import torch

TOKENS = 32


@dataclass(frozen=True)
class Difference:
    """One layer: largest difference, relative to the largest dense output; coverage is sum over
    experts of w * scale.
    """

    layer: int
    relative: float
    coverage: float


def compare(source: Checkpoint, out: Checkpoint, *, seed: int = 0) -> Iterator[Difference]:
    """How far each MoE layer of `out` is from the FFN of `source` that it was made from.

    Every layer is read alone: memory is one FFN, then the router, the shared expert and one
    expert. Nothing is said of a result without experts. Raises MoetoolError where a block cannot
    be computed with.
    """
    import torch

    from moetool.forward import block as blocks
    from moetool.kernels import moe

    dense = text_model(source.config)
    if text_model(out.config).layout.kind != "moe" or dense.layout.kind == "moe":
        return
    mixture = Mixture.of(out)
    act = blocks.activation(mixture)
    for layer in mixture.layers:
        ffn = DenseFfn.read(source, dense, layer)
        x = torch.randn(
            TOKENS, ffn.gate.shape[1], generator=torch.Generator().manual_seed(seed + layer)
        )
        expected = moe.ffn(x, ffn.gate, ffn.up, ffn.down, act)
        del ffn
        block = blocks.read(mixture, layer, hold=False)
        routing, always = block.route(x), block.always(x)
        made = block.routed(x, routing)
        made = made if always is None else made + always
        apart = (made - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        yield Difference(layer, float(apart), float(routing.weight.sum(-1).mean()))


@dataclass(frozen=True)
class DenseFfn:
    """A dense FFN in float32: gate and up [width, hidden], down [hidden, width]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def read(cls, source: Checkpoint, at: TextModel, layer: int) -> DenseFfn:
        """A layer's FFN, whether its gate and up lie in one tensor or in two."""

        def stored(role: str) -> torch.Tensor | None:
            slot = at.layout.role(f"ffn.{role}")
            name = slot and at.name(slot.name, layer=layer)
            return source.matrix(name).float() if name in source.tensors else None

        both, down = stored("gate_up"), stored("down")
        gate, up = both.chunk(2) if both is not None else (stored("gate"), stored("up"))
        assert gate is not None and up is not None and down is not None
        return cls(gate, up, down)
