"""Where a config and the tensors beside it say different things, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moetool.data import JsonMapping
from moetool.errors import MoetoolError
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.text_model import TextModel


def found(checkpoint: Checkpoint, at: TextModel, experts: Mapping[int, int]) -> list[str]:
    """Of a text model; `experts` are those that each of its layers holds, by number."""
    if at.groups:  # read strictly, and refused where they are not as said
        return []
    try:
        return [
            *_spellings(at),
            *_experts(at, experts),
            *_widths(checkpoint, at),
            *_layers(at, experts),
        ]
    except MoetoolError as problem:  # a field that is no number
        return [problem.message]


def _spellings(at: TextModel) -> Iterator[str]:
    """Two names of one field, with two values."""
    said = _inside(at)
    for alias, real in sorted(at.layout.aliases.items()):
        if alias in said and real in said and said[alias] != said[real]:
            yield f"the config says {alias} {said[alias]} and {real} {said[real]}, which are one thing"


def _inside(at: TextModel) -> JsonMapping:
    said = at.config
    for part in filter(None, at.layout.text_config.split(".")):
        said = said.get(part) or {}
    return said


def _experts(at: TextModel, held: Mapping[int, int]) -> Iterator[str]:
    """The number of experts, and how many run."""
    name, top = at.layout.fields.get("experts"), at.layout.fields.get("top_k")
    told, top_k = at.field("experts"), at.field("top_k")
    own = at.text.get("per_layer_config") or {}
    counts = {n: count for n, count in held.items() if count and str(n) not in own}
    more = at.text.get(at.layout.overlay.law.zero) or 0  # zero experts may have tensors too
    usual = (told, told + more) if isinstance(told, int) else ()
    other = {n: count for n, count in counts.items() if usual and count not in usual}
    if other:
        first, *_ = other
        yield f"the config says {name} {told}, and layer {first} holds {other[first]} experts"
    least = min([told, *counts.values()] if isinstance(told, int) else [*counts.values(), 1 << 31])
    if counts and isinstance(top_k, int) and top_k > least:
        yield f"the config says {top} {top_k}, and a layer has only {least} experts to choose from"


def _widths(checkpoint: Checkpoint, at: TextModel) -> Iterator[str]:
    """The sides of the embeddings."""
    sides = [at.layout.fields.get("vocab"), at.layout.fields.get("hidden")]
    for slot in at.layout.tensors:
        stored = checkpoint.tensors.get(at.prefix + slot.name)
        if stored is None or list(slot.shape or ()) != sides:
            continue
        for side, name in zip(stored.shape, sides, strict=False):
            told = at.text.get(str(name))
            if isinstance(told, int) and told != side:
                yield f"the config says {name} {told}, and {stored.name} is {list(stored.shape)}"


def _layers(at: TextModel, held: Mapping[int, int]) -> Iterator[str]:
    """How many layers there are; those beyond are a model's that predicts more tokens."""
    told, name = at.field("layers"), at.layout.fields.get("layers")
    if isinstance(told, int) and held and max(held) + 1 < told:
        yield f"the config says {name} {told}, and there are tensors of {max(held) + 1} layers only"
    if isinstance(told, int) and held and min(held) < told < max(held) + 1:
        beyond = max(held) + 1 - told
        if beyond > 1:
            yield (
                f"the config says {name} {told}, and there are tensors of {max(held) + 1} layers: "
                f"{beyond} of them would not run"
            )
