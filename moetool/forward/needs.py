"""What a walk holds: bytes promised before it begins, and how it may hold less."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moetool.errors import MoetoolError
from moetool.forward import stock
from moetool.forward.batches import Batches
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.spec import FLOATS
from moetool.surgery.text_model import TextModel, text_model

# python, numpy, torch, transformers and accelerate imported and a model built, measured
RESERVE = 460_000_000
# float32 vectors of the hidden size that a token in work holds, beside attention's own
PER_TOKEN = 16
PER_TENSOR = 1500  # names and places of a tensor
# float32 matrices [heads, length, length] that a family with eager attention alone holds at once:
# 2.2 (qwen3_moe made eager) to 3.4 (gpt_oss, which has sinks), measured
PER_ATTENTION = 4


class Fit(NamedTuple):
    """How a walk keeps its promise: experts held in float32 or as stored, hidden states spilled to
    a file or not, and the promised peak in bytes.
    """

    widen: bool
    spill: bool
    peak: int


@dataclass(frozen=True)
class Promised:
    """Promised bytes: `floor` whatever is done, the widest layer's experts as `stored` and
    `widened`, what comparing with the family's own block takes before a layer is there
    (`compared`), and `hidden` for all hidden states.
    """

    floor: int
    stored: int
    widened: int
    compared: int
    hidden: int
    outside: int  # embeddings, last norm and head, which stay

    def fit(self, memory: int | None, *, widened: bool = False) -> Fit:
        """The fastest way that fits; MoetoolError when even the least does not. `widened`: experts
        must be held in float32.
        """
        ways = [Fit(w, s, self._peak(w, s)) for w, s in _WAYS if w or not widened]
        for way in ways:
            if memory is None or way.peak <= memory:
                return way
        raise MoetoolError(
            "sending text through the model does not fit into --memory",
            expected=f"at least {ways[-1].peak:,} bytes",
            found=f"{memory:,} bytes",
            hint="one layer must fit; raise --memory or lower --batch-tokens, or use a method without text",
        )

    def least(self, *, widened: bool = False) -> int:
        """The peak of the way that holds least."""
        return self._peak(widened, True)

    def _peak(self, widen: bool, spill: bool) -> int:
        experts = self.widened if widen else self.stored
        return self.floor + max(self.compared, experts) + (0 if spill else self.hidden)


# (widen, spill), the fastest first
_WAYS = ((True, False), (True, True), (False, False), (False, True))


@dataclass(frozen=True)
class _Sizes:
    """Bytes of each layer: routed experts as they are `stored` and `widened` to float32, and all
    other tensors in float32 (None: outside the layers).
    """

    stored: dict[int, int]
    widened: dict[int, int]
    others: dict[int | None, int]

    @classmethod
    def of(cls, source: Checkpoint, at: TextModel, mixture: Mixture | None) -> _Sizes:
        sizes = cls(defaultdict(int), defaultdict(int), defaultdict(int))
        count = int(at.field("layers") or 1)
        for name, stored in source.tensors.items():
            counted = mixture.counted.get(name) if mixture else None
            if counted is not None and counted.kind == "expert":
                sizes.stored[counted.layer] += stored.held
                sizes.widened[counted.layer] += stored.held * (1 if stored.parts else 2)
                continue
            found = at.layout.match(name.removeprefix(at.prefix))
            layer = found.layer if found else None
            inside = layer if layer is not None and layer < count else None
            width = max(1, stored.held // max(1, stored.elements))
            sizes.others[inside] += stored.held * (4 // width)
        return sizes


def needs(source: Checkpoint, batches: Batches, *, extra: int = 0) -> Promised:
    """What a walk over these batches holds; `extra` is what the onlooker keeps for a layer."""
    at = text_model(source.config)
    mixture = Mixture.of(source) if at.layout.kind == "moe" else None
    sizes = _Sizes.of(source, at, mixture)
    widest = max(sizes.stored.values(), default=0)
    widened = max(sizes.widened.values(), default=0)
    outside = sizes.others.pop(None, 0)
    vector = 4 * int(at.field("hidden") or 0)
    # half an expert in float32: as it is stored, where that is 16 bits
    one = widened // 2 // max(1, mixture.experts) if mixture else 0
    # theirs: listed, stacked, joined; then ours
    compared = 2 * 4 * one * compared_experts(mixture) if mixture else 0
    tokens = [b.ids.size for b in batches.batches]
    work = PER_TOKEN * vector * max(tokens) + PER_TENSOR * len(source.tensors)
    work += _attention(source, batches, int(at.field("heads") or 0))
    floor = RESERVE + outside + 2 * max(sizes.others.values(), default=0) + extra + work
    hidden = vector * sum(tokens)
    return Promised(floor, widest + 8 * one, widened + 8 * one, compared, hidden, outside)


def whole(source: Checkpoint, batches: Batches, *, extra: int = 0) -> int:
    """Promised bytes of a model that is held whole in float32, packed experts as they are stored,
    with what its last layer gave of all batches.
    """
    heads = int(text_model(source.config).field("heads") or 0)
    work = _attention(source, batches, heads) + extra
    return held_whole(source, [b.ids.size for b in batches.batches]) + work


def held_whole(source: Checkpoint, tokens: Sequence[int]) -> int:
    """The same for batches of so many tokens, but for attention that is held as matrices; asks
    nobody but the headers.
    """
    vector = 4 * int(text_model(source.config).field("hidden") or 0)
    stored = source.stored.values()
    held = sum(4 * t.elements if t.dtype in FLOATS else t.stop - t.start for t in stored)
    largest = max((4 * t.elements for t in source.tensors.values()), default=0)
    work = PER_TOKEN * vector * max(tokens) + PER_TENSOR * len(source.stored)
    return RESERVE + held + 2 * largest + work + vector * sum(tokens)


def _attention(source: Checkpoint, batches: Batches, heads: int) -> int:
    """Bytes of the attention matrices of a batch, where the family's class holds them."""
    if not stock.attends_eagerly(source.config, source.folder):
        return 0
    squares = [int(b.ids.shape[0] * b.ids.shape[1] ** 2) for b in batches.batches]
    return PER_ATTENTION * 4 * heads * max(squares)


def compared_experts(mixture: Mixture) -> int:
    """How many experts of a layer are compared with the family's own block: a few more than run,
    as many in each router group.
    """
    return min(mixture.experts, -(-(mixture.top_k + 2) // mixture.groups) * mixture.groups)
