"""A source that is quantized already: what of it stays as it lies, what is decoded, and what is
rounded a second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from moetool.methods.quantize.choice import Choice
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.forms.gguf import PLAIN
from moetool.surgery.spec import InParts

DECODED = "the plan does not name it, and its {form} cannot stand beside the new format: decoded"


def kept(source: Checkpoint, choice: Choice) -> Choice:
    """The choice, with the quantized matrices that it leaves: kept, or decoded and named so."""
    named = {choice.matrices[name].piece.name for name in choice.formats}
    cut = {m.piece.name for m in choice.matrices.values()} - set(choice.matrices)
    stay: dict[str, InParts] = {}
    left = dict(choice.left)
    for name, stored in source.tensors.items():
        if stored.parts is None or name in named:
            continue
        if name not in cut and _stands_beside(stored.parts, choice):
            stay[name] = stored.parts
        elif _is_rounded(stored.parts):
            mine = [n for n, m in choice.matrices.items() if m.piece.name == name]
            left |= dict.fromkeys(mine or [name], DECODED.format(form=stored.parts.form))
    return replace(choice, left=left, kept=stay)


def warnings(source: Checkpoint, choice: Choice) -> Iterator[str]:
    """What somebody must know who quantizes what is quantized."""
    decoded = [n for n, why in choice.left.items() if why.endswith("decoded")]
    if decoded:
        yield (
            f"{len(decoded)} quantized matrices are decoded to full weights, because their form "
            f"cannot stand beside the new one ({decoded[0]}, ...): name their roles in --plan"
        )
    again = Counter[str]()
    for name, asked in choice.formats.items():
        parts = source.tensor(choice.matrices[name].piece.name).parts
        word = asked.word.removeprefix("gguf:")
        same = parts is not None and (parts.form, parts.params) == (asked.form, asked.params)
        exact = same or asked.params.get("kind") in PLAIN
        if parts is not None and _is_rounded(parts) and not exact and word != parts.form:
            again[parts.form] += 1
    for form, count in again.items():
        yield (
            f"{count} matrices were rounded before ({form}), and are rounded a second time: the "
            "errors add up. The model that the source was made from gives a better one"
        )


def _stands_beside(parts: InParts, choice: Choice) -> bool:
    """Whether a model that is quantized so can hold these parts as they are."""
    form = forms.named(parts.form)
    chosen = list(choice.formats.values())
    methods = {forms.named(asked.form).quant_method for asked in chosen}
    if form.container != "safetensors" or methods != {form.quant_method}:
        return False
    return form.mixes or all((a.form, a.params) == (parts.form, parts.params) for a in chosen)


def _is_rounded(parts: InParts) -> bool:
    """Whether values were lost: not in a GGUF file's 16 bits."""
    return bool(forms.named(parts.form).quant_method or any(parts.params.get("kinds", ())))
