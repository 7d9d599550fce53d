"""The mean of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.surgery.route import POOLS


@dataclass(frozen=True)
class Pooling:
    """The options of the key."""

    pool: str = option(
        POOLS[0],
        "what is averaged over the prompt: what goes into the first layer, images in their place, "
        "or what the FFN sees",
        choices=POOLS,
    )


class PooledKey(RouteKey):
    """The mean of the prompt: experts are chosen for a sequence as a whole, by its embeddings or
    what the FFN sees of it, through an RMSNorm and a linear with a bias. While text is generated
    the choice stays; in training the prompt is what labels leave out, or `prompt=` says.

    Awaker2.5-VL (arXiv 2411.10669).
    """

    name = "pooled"
    Options: ClassVar[type] = Pooling
    own: Pooling
    apart = False

    @property
    def bias(self) -> bool:
        return True

    def options(self, ground: Ground, choices: int, top_k: int) -> JsonObject:
        of = self.own.pool
        return {"norm": True} | ({} if of == POOLS[0] else {"of": of})
