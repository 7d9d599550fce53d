"""The noise level of a diffusion step (MoDE, arXiv 2412.12953)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from moetool.modeling.routes.scorer import Scorer
from moetool.modeling.signals import NOISE, Heard


class NoiseScorer(Scorer):
    """A linear embedding of the number, and a SwiGLU MLP of it: W (a * silu(b)) with a, b the
    halves of `inner`. All tokens of a sequence have the same scores.
    """

    name: ClassVar[str] = "noise"
    sites: ClassVar[tuple[str, ...]] = ("ffn",)
    reads: ClassVar[tuple[str, ...]] = (NOISE,)
    weight: Tensor
    embed: Tensor
    inner: Tensor

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        level = heard.of_sequences(NOISE, len(x)).to(x).unsqueeze(-1)
        seen = functional.linear(level, self.embed, self.held("embed_bias"))
        straight, gate = functional.linear(seen, self.inner, self.held("inner_bias")).chunk(2, -1)
        middle = straight * functional.silu(gate)
        return functional.linear(middle, self.weight, self.held("bias"))
