"""What a whole pass of the model before saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground
from moetool.methods.upcycle.keys.key import WIDEST, RouteKey
from moetool.surgery.groups import LINEAR
from moetool.surgery.route import TWOPASS


@dataclass(frozen=True)
class Classifier:
    """The options of the key, as PEFT's XLoraConfig has them."""

    classifier_depth: int = option(
        1, "linears of the classifier, with ReLU between them", minimum=1, maximum=WIDEST
    )
    classifier_width: int = option(2048, "width between them", minimum=1, maximum=WIDEST)
    layerwise: bool = option(False, "scores of its own for each linear, else one for all")
    pass_weight: float = option(
        0.0, "weight of each expert in the pass before; 0: none works there", minimum=0
    )


class TwopassKey(RouteKey):
    """What a whole pass of the model before saw: its last hidden states, through one classifier,
    weigh the experts of all linears in a second pass. X-LoRA (arXiv 2402.07148), as PEFT runs it;
    without a cache.
    """

    name = TWOPASS
    Options: ClassVar[type] = Classifier
    own: Classifier
    sites: ClassVar[tuple[str, ...]] = (LINEAR,)
    laws = ("soft",)

    @classmethod
    def law(cls, usual: str, base: str) -> str:
        return "soft"

    @classmethod
    def most(cls, top_k: int, experts: int) -> int:
        return experts

    def check(self, ground: Ground, choices: int, top_k: int) -> None:
        first = ground.blocks[0].linears[0]
        seen = first.sides(ground.stored(first, min(ground.layers)).shape)[1]
        if seen != ground.at.field("hidden"):
            raise UsageError(
                f"--key {self.name} stands in a linear that sees hidden states",
                expected=f"an input of {ground.at.field('hidden')}",
                found=f"{seen} at {first.slot.name}",
                hint="name one that does first in --linears, for example q_proj",
            )

    def options(self, ground: Ground, choices: int, top_k: int) -> JsonObject:
        own, modules = self.own, len(ground.layers) * len(ground.blocks)
        made: JsonObject = {"width": own.classifier_width} if own.classifier_depth > 1 else {}
        made |= {"middle": own.classifier_depth - 2} if own.classifier_depth > 2 else {}
        made |= {"modules": modules} if own.layerwise else {}
        return made | ({"before": own.pass_weight} if own.pass_weight else {})
