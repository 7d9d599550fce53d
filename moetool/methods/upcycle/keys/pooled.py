"""The mean of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.surgery.groups import LINEAR
from moetool.surgery.route import POOLS, SPAN


@dataclass(frozen=True)
class Pooling:
    """The options of the key."""

    pool: str = option(
        POOLS[0],
        "what is averaged over the prompt: what goes into the first layer, images in their place, "
        "or what the FFN sees",
        choices=POOLS,
    )
    prompt_from: str = option(
        "",
        "ids of tokens: the prompt counts from the first of these in a sequence, for example where "
        "an image starts; from its beginning where there is none",
        metavar="ID,...",
    )
    prompt_until: str = option(
        "",
        "ids of tokens: the prompt counts up to the next of these, for example where the user's "
        "turn ends",
        metavar="ID,...",
    )


class PooledKey(RouteKey):
    """The mean of the prompt: experts are chosen for a sequence as a whole, by its embeddings or
    what the FFN sees of it, through an RMSNorm and a linear with a bias. While text is generated
    the choice stays; in training the prompt is what labels leave out, or `prompt=` says.

    Awaker2.5-VL (arXiv 2411.10669).
    """

    name = "pooled"
    sites = ("ffn", LINEAR)
    Options: ClassVar[type] = Pooling
    own: Pooling
    apart = False

    @property
    def bias(self) -> bool:
        return True

    def options(self, ground: Ground, choices: int, top_k: int) -> JsonObject:
        of, wide, made = (
            self.own.pool,
            ground.at.field("hidden"),
            {"norm": True, **self._span(ground)},
        )
        if of != POOLS[0]:
            return made | {"of": of}
        firsts = [block.linears[0] for block in ground.blocks]
        seen = {one.sides(ground.stored(one, ground.layers[0]).shape)[1] for one in firsts}
        return made if seen == {wide} else made | {"width": wide}

    def _span(self, ground: Ground) -> JsonObject:
        """Where a prompt begins and ends. UsageError for what is no token."""
        said, vocab = (self.own.prompt_from, self.own.prompt_until), ground.at.field("vocab")
        found: JsonObject = {}
        for word, name, ids in zip(("from", "until"), SPAN, said, strict=True):
            numbers = [int(n) if n.isdigit() else -1 for n in ids.split(",") if ids]
            if any(not 0 <= n < (vocab or n + 1) for n in numbers):
                raise UsageError(
                    f"--prompt-{word} names no tokens of the model",
                    expected=f"numbers from 0 to {(vocab or 1) - 1}, with a comma between them",
                    found=ids,
                    hint="see the tokenizer's added tokens",
                )
            found |= {name: numbers} if numbers else {}
        return found
