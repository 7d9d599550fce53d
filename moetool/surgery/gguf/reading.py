"""What a GGUF file holds, under the names and with the shapes of its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.kernels import turn
from moetool.surgery.containers.gguf import logical
from moetool.surgery.forms import Known
from moetool.surgery.forms.form import float_of
from moetool.surgery.gguf.families import Place, family
from moetool.surgery.layout import Needed
from moetool.surgery.spec import InParts, Shape, Stored
from moetool.surgery.text_model import text_model

FORM = "in_gguf"


def seen(tensors: Mapping[str, Stored], types: Mapping[str, str], config: JsonObject) -> Known:
    """Every tensor that the family needs, decoded from where it lies; MoetoolError for a family
    whose names in GGUF files are not known, or a tensor that is not there.
    """
    at = text_model(config)
    found = family(at)
    made: dict[str, Stored] = {}
    for needed in at.layout.slots(at.config):
        matched = at.layout.match(needed.name)
        places = found.places(at, matched) if matched else ()
        stored = tuple(tensors[p.name] for p in places if p.name in tensors)
        if places and len(stored) == len(places):
            kinds = [types.get(t.name, "") for t in stored]
            dtype = "F32" if needed.slot.role == "router.bias" else float_of(config)
            shape = _shape(needed, places[0], stored[0], kinds[0])
            made[needed.name] = _matrix(needed.name, dtype, shape, _held(places[0], stored, kinds))
    if not made:
        raise MoetoolError(
            "no tensor of this GGUF file is one of the family in config.json",
            expected=f"names of llama.cpp's {found.arch}",
            found=", ".join(list(tensors)[:3]),
            hint="config.json is another model's: restore the original",
        )
    return Known(made, {k: v for k, v in config.items() if k != "quantization_config"}, {FORM: {}})


def _shape(needed: Needed, place: Place, stored: Stored, kind: str) -> Shape:
    """As the config says; where it does not, as the file does."""
    said = needed.shape or (None,)
    known = tuple(n for n in said if n is not None)
    if len(known) == len(said):
        return known
    lies = logical(stored.shape, kind or None)
    return turn.shape_before(lies if place.expert is None else lies[1:], place.turn)


def _held(place: Place, stored: tuple[Stored, ...], kinds: list[str]) -> InParts:
    params: JsonObject = {"kinds": kinds, "turn": list(place.turn)}
    if place.expert is not None:
        params["expert"] = place.expert
    return InParts(FORM, stored, params)


def _matrix(name: str, dtype: str, shape: Shape, parts: InParts) -> Stored:
    return replace(parts.tensors[0], name=name, dtype=dtype, shape=shape, parts=parts)
