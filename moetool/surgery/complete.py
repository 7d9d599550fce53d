"""Does a checkpoint hold every tensor that its config and its family's layout ask for, in the
right shapes? Headers alone answer.

Loaders start a missing tensor at random and say so in a line that scrolls by: a source with a hole
must be refused before any work, and an output with one before it is called verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

from moetool.errors import MoetoolError
from moetool.surgery import grown, ragged
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.family import GroupSlot
from moetool.surgery.layout import Layout, Needed, Shape
from moetool.surgery.spec import Stored
from moetool.surgery.text_model import TextModel, any_text_model, text_model

MISSING = "a tensor that the family needs is missing"
SHAPED = "a tensor has a wrong shape"
_TIED = "tie_word_embeddings"
PLACELESS = "an expert that the config has no place for"


@dataclass(frozen=True)
class Fault:
    """A tensor that is not there (`file` is the folder), or not of the shape that the config
    says."""

    what: str
    file: str
    tensor: str
    expected: Any
    found: Any


@dataclass(frozen=True)
class Compared:
    """How many names and shapes are as they must be, and the first that is not."""

    right: int
    fault: Fault | None = None


def compare(checkpoint: Checkpoint) -> Compared:
    """Names and shapes against the family's layout; MoetoolError where the family is unknown."""
    right = 0
    for found in _answers(checkpoint, text_model(checkpoint.config)):
        if isinstance(found, Fault):
            return Compared(right, found)
        right += found
    return Compared(right)


def check(sources: Iterable[Checkpoint]) -> list[str]:
    """Refuse sources with holes or tensors of other shapes than their config says; returns what
    could not be counted, in sentences for the user.
    """
    return list(chain.from_iterable(_checked(source) for source in sources))


def _checked(source: Checkpoint) -> list[str]:
    at = any_text_model(source.config, source.tensors)
    if at is None:
        family = source.config.get("model_type")
        return [f"{source.folder}: {family!r} is no family moetool knows: no tensor was counted"]
    if at.path and at.layout.model_type != source.config.get("model_type") and not at.prefix:
        return []  # the text part of a family without data, under names that are its own
    answers = chain(_answers(source, at), _placeless(source, at))
    fault = next((f for f in answers if isinstance(f, Fault)), None)
    if fault is not None:
        raise MoetoolError(
            fault.what,
            file=fault.file,
            tensor=fault.tensor,
            expected=fault.expected,
            found=fault.found,
            hint="the checkpoint is incomplete, or its config.json is another model's: "
            "download or save it again",
        )
    return _uncounted(source, at)


def _uncounted(source: Checkpoint, at: TextModel) -> list[str]:
    """Tensors of the text model in layers that the layout does not name."""
    places = {s.name for s in at.layout.tensors if s.layers == "some" and at.layout.in_text(s)}
    found = [n for n in source.tensors if (m := at.match(n)) and m.slot.name in places]
    if not found:
        return []
    family = at.layout.model_type
    return [
        f"{len(found)} tensors were not counted: the layout of {family} does not say which layers "
        f"have them ({found[0]}, ...)"
    ]


def _answers(checkpoint: Checkpoint, at: TextModel) -> Iterator[int | Fault]:
    """How many slots were right, one after the other, and every fault."""
    layout, config = at.layout, at.config
    stacked = _is_stacked(checkpoint, at)
    if stacked:
        yield from _stacked(checkpoint, at)
    for needed in layout.slots(config):
        if stacked and str(needed.slot.role).startswith("expert."):
            continue
        if not (_is_tied(checkpoint, layout, needed) or _stands_for(checkpoint, at, needed)):
            yield _answer(checkpoint, at, needed) or 1
    for tower in at.towers.values():
        own = (n for n in tower.layout.slots(tower.config) if isinstance(n.slot, GroupSlot))
        yield from (_answer(checkpoint, tower, needed) or 1 for needed in own)


def _placeless(checkpoint: Checkpoint, at: TextModel) -> Iterator[Fault]:
    """Experts in a dense layer, or beyond the last: cut with the others they would be lost, copied
    they would be tensors that nobody loads.
    """
    layers, experts = at.field("layers") or 0, at.field("experts") or 0
    experts += int(at.text.get(at.layout.overlay.law.zero) or 0)  # some files hold those too
    places = set(at.moe_layers())
    for name, stored in checkpoint.tensors.items():
        found, layout = at.anywhere(name)
        if found is None or not str(found.slot.role).startswith("expert."):
            continue
        nowhere = layers if "{layer}" in found.slot.name else 0  # one module has no number
        layer, expert = found.numbers.get("layer", nowhere), found.numbers.get("expert", 0)
        here, most = places, experts
        if isinstance(found.slot, GroupSlot):
            held = grown.experts_in(layout, found.slot.name)
            here, most = set(held), held.get(layer, 0)
        wanted = ""
        if layer < layers and layer not in here:
            wanted = f"no experts in layer {layer}"
        elif expert >= most:
            wanted = f"experts 0 to {most - 1}"
        if wanted:
            file = f"{checkpoint.folder}/{stored.file}"
            yield Fault(PLACELESS, file, name, wanted, "one more")


def _is_stacked(checkpoint: Checkpoint, at: TextModel) -> bool:
    """Whether the experts are stacked though the family's files have a tensor an expert."""
    own = {slot.name for slot in at.layout.tensors}
    fused = [template for template in at.layout.fused().values() if template not in own]
    places = product(fused, at.moe_layers())
    return any(at.name(template, layer=i) in checkpoint.tensors for template, i in places)


def _is_tied(checkpoint: Checkpoint, layout: Layout, needed: Needed) -> bool:
    """Whether the whole config ties what its text part does not mention."""
    return bool(checkpoint.config.get(_TIED)) and needed.slot.name in layout.tied


def _stands_for(checkpoint: Checkpoint, at: TextModel, needed: Needed) -> bool:
    """Whether a tensor that is not there shares the memory of another that is: of tied tensors a
    file may hold any one.
    """
    tied = at.text.get(_TIED, checkpoint.config.get(_TIED))
    names = (n for n, source in at.layout.tied.items() if source == needed.slot.name)
    held = checkpoint.stored
    return (
        bool(tied)
        and at.prefix + needed.name not in held
        and any(at.prefix + n in held for n in names)
    )


def _answer(checkpoint: Checkpoint, at: TextModel, needed: Needed) -> Fault | None:
    name, shape = at.prefix + needed.name, needed.shape
    stored = checkpoint.tensors.get(name)
    if stored is None:
        if _in_another_form(checkpoint, name):
            return None
        return Fault(MISSING, checkpoint.folder, name, list(shape or ()) or "present", "nothing")
    if shape is None or _packed(checkpoint, stored) or _adjusted(at, needed):
        return None
    fault = _shaped(checkpoint, stored, shape)
    if fault is None or not (at.layout.overlay.turns_stacks and _is_stack(needed)):
        return fault
    turned = (*shape[:-2], shape[-1], shape[-2])
    return fault if _shaped(checkpoint, stored, turned) else None


def _is_stack(needed: Needed) -> bool:
    """Whether it holds a matrix of every expert."""
    return str(needed.slot.role) in ("expert.gate_up", "expert.down") and (
        "{expert}" not in needed.slot.name
    )


def _shaped(checkpoint: Checkpoint, stored: Stored, wanted: Shape) -> Fault | None:
    fits = all(w in (None, n) for w, n in zip(wanted, stored.shape, strict=False))
    if fits and len(wanted) == len(stored.shape):
        return None
    file = f"{checkpoint.folder}/{stored.file}"
    return Fault(SHAPED, file, stored.name, list(wanted), list(stored.shape))


def _adjusted(at: TextModel, needed: Needed) -> bool:
    """Whether the family's class computes the width of this FFN itself, from more than the
    config's field.
    """
    flag = at.layout.overlay.adjusts_width
    return str(needed.slot.role).startswith("ffn.") and bool(flag and at.text.get(flag))


def _in_another_form(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a matrix lies in parts that no form of ours knows: `q_proj.qweight` of GPTQ for
    `q_proj.weight`.
    """
    if "quantization_config" not in checkpoint.config:
        return False
    head = name.removesuffix("weight")
    return any(n.startswith(head) or n.startswith(name + "_") for n in checkpoint.stored)


def _packed(checkpoint: Checkpoint, stored: Stored) -> bool:
    """Whether a tensor's shape is that of packed integers (bitsandbytes), not of a matrix."""
    return "quantization_config" in checkpoint.config and stored.dtype[0] in "UI"


def _stacked(checkpoint: Checkpoint, at: TextModel) -> Iterator[int | Fault]:
    """Stacked experts: present in every MoE layer, with as many slabs as the config has experts,
    gate and up twice as high as down is wide.
    """
    layout, text, hidden = at.layout, at.text, at.field("hidden")
    wide = layout.fields.get("expert_width") or layout.fields.get("width")
    for layer in at.moe_layers():
        names = [at.name(layout.fused()[role], layer=layer) for role in ("gate_up", "down")]
        gap = next((n for n in names if n not in checkpoint.tensors), None)
        if gap is not None:
            if not _in_another_form(checkpoint, gap):
                yield Fault(MISSING, checkpoint.folder, gap, f"experts of layer {layer}", "nothing")
            continue
        both, down = (checkpoint.tensors[n] for n in names)
        own = text | ragged.overrides(text, layer)
        experts, width = (layout.evaluate(f, own) for f in (layout.fields["experts"], wide))
        height = None if width is None else 2 * width
        for stored, wanted in ((both, (experts, height, hidden)), (down, (experts, hidden, width))):
            packed = _packed(checkpoint, stored)
            yield 1 if packed else _shaped(checkpoint, stored, wanted) or 1
