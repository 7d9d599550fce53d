"""The noise level of a diffusion step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground
from moetool.methods.upcycle.keys.key import WIDEST, RouteKey

_WIDER = 4  # the MLP than the embedding, in MoDE


@dataclass(frozen=True)
class NoiseLevel:
    """The options of the key."""

    noise_dim: int = option(64, "width of the noise level's embedding", minimum=1, maximum=WIDEST)


class NoiseKey(RouteKey):
    """The noise level of a diffusion step: a number of each sequence that the caller gives to
    forward, `noise=[batch]`, through an embedding and a SwiGLU MLP. MoDE (arXiv 2412.12953).
    """

    name = "noise"
    Options: ClassVar[type] = NoiseLevel
    own: NoiseLevel
    apart = False

    def options(self, ground: Ground, choices: int, top_k: int) -> JsonObject:
        return {"dim": self.own.noise_dim, "width": _WIDER * self.own.noise_dim}
