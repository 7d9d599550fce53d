"""What the fields of a config may hold: one check, when a checkpoint is opened, for all who read
them later.

A count is a count, and small enough to be gone through; a size is no less than it can be. Without
this a config of ten million layers, or of -5 positions, is waited for instead of refused.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetool.data import JsonMapping
from moetool.errors import MoetoolError
from moetool.surgery.text_model import text_model

if TYPE_CHECKING:
    from moetool.surgery.text_model import TextModel

LAYERS = 4096
EXPERTS = 1 << 15  # of a layer
IN_ALL = 1 << 20  # experts of all layers
SIZE = 1 << 31  # numbers in a row, tokens, positions
DEEP = 32  # objects in objects


@dataclass(frozen=True)
class _Rule:
    """What a field may hold, None and lists of the same beside it."""

    kind: str  # whole number | number | true or false | text
    least: float = 0
    most: float = SIZE

    @property
    def expected(self) -> str:
        """In words."""
        if self.kind == "whole number":
            return f"a whole number from {self.least:g} to {self.most:,}"
        return f"a finite {self.kind}" if self.kind == "number" else self.kind

    def fits(self, value: Any) -> bool:
        """Whether one value does."""
        if self.kind == "whole number":
            return type(value) is int and self.least <= value <= self.most
        if self.kind == "number":
            return type(value) in (int, float) and math.isfinite(value)
        return isinstance(value, bool if self.kind == "true or false" else str)


_COUNT, _SIZE = _Rule("whole number"), _Rule("whole number", least=1)
_LAYER = _Rule("whole number", -1, LAYERS)  # a number of layers, or of one; -1 is the last
_MEANINGS = {
    "layers": _Rule("whole number", 1, LAYERS),
    "hidden": _SIZE,
    "heads": _SIZE,
    "vocab": _SIZE,
    "experts": _Rule("whole number", 0, EXPERTS),
    "shared_count": _Rule("whole number", 0, EXPERTS),
    "top_k": _Rule("whole number", 0, EXPERTS),
    "groups": _Rule("whole number", 0, EXPERTS),
    "routed_scale": _Rule("number"),
    "renorm": _Rule("true or false"),
}
_NEEDED = ("layers", "hidden", "vocab")
# In every part of a config, whatever its family: by how a field's name ends.
_ENDINGS = (
    (re.compile(r"(max_position_embeddings|n_positions|n_ctx)$"), _SIZE),
    (
        re.compile(r"(num_hidden_layers|num_layers|n_layers?|_layers_num)$"),
        _Rule(_COUNT.kind, 0, LAYERS),
    ),
    (re.compile(r"(^|_)(experts|num_experts_per_tok)$"), _Rule(_COUNT.kind, 0, EXPERTS)),
    (re.compile(r"_(size|dim|rank|heads|groups|embeddings|positions)$"), _Rule(_COUNT.kind, -1)),
)
_OBJECT = re.compile(r"_config$|^rope_(parameters|scaling)$")
_TEXT = re.compile(r"^model_type$|^architectures$|^hidden_act(ivation)?$")


def check(config: JsonMapping, file: Path) -> None:
    """MoetoolError naming the field that cannot be; families without a layout are looked at by
    their fields' names alone.
    """
    _walk(config, str(file), "", 0)
    try:
        at = text_model(dict(config))
    except MoetoolError:
        return
    text = at.text
    for meaning in _NEEDED:
        name = at.layout.fields.get(meaning, "")
        if name and text.get(name) is None:
            raise _wrong(name, _MEANINGS[meaning].expected, "null", str(file))
    for name, rule in _rules(at):
        _check(rule, name, text.get(name), str(file))
    for name, rule in _singles(at):
        if text.get(name) is not None and not rule.fits(text[name]):
            raise _wrong(name, rule.expected, text[name], str(file))
    own = text.get("per_layer_config") or {}
    for layer, fields in own.items():
        _object(f"per_layer_config.{layer}", fields, str(file))
        for name, rule in _rules(at):
            _check(rule, f"per_layer_config.{layer}.{name}", fields.get(name), str(file))
    _check_product(at, str(file))
    _check_sites(at, str(file))


def _walk(part: JsonMapping, file: str, path: str, depth: int) -> None:
    if depth > DEEP:
        raise _wrong(path, "an object", f"more than {DEEP} objects in one another", file)
    for name, value in part.items():
        here = f"{path}.{name}" if path else name
        if _OBJECT.search(name) and value is not None:
            _object(here, value, file)
        if name == "architectures" and not isinstance(value, list | None):
            raise _wrong(here, "a list of names", value, file)
        if _TEXT.search(name):
            _check(_Rule("text"), here, value, file)
        rule = next((r for ending, r in _ENDINGS if ending.search(name)), None)
        if rule is not None and type(value) is int:
            _check(rule, here, value, file)
        if isinstance(value, Mapping):
            _walk(value, file, here, depth + 1)


def _object(name: str, value: Any, file: str) -> None:
    if not isinstance(value, Mapping) or len(value) > LAYERS:
        found = f"{len(value):,} fields" if isinstance(value, Mapping) else value
        raise _wrong(name, "an object", found, file)


def _rules(at: TextModel) -> Iterator[tuple[str, _Rule]]:
    """(field, rule) of everything that the family's layout reads as a number or a word."""
    layout, law = at.layout, at.layout.overlay.law
    for meaning, name in layout.fields.items():
        yield name, _MEANINGS.get(meaning, _COUNT)
    for name in (law.zero, law.least_sum, law.near):
        if name:
            yield name, _Rule("number")
    known = set(layout.fields.values())
    sizes = chain.from_iterable(slot.shape or () for slot in layout.tensors)
    words = chain.from_iterable(re.findall(r"[A-Za-z_]\w*", size) for size in sizes if size)
    for name in sorted(set(words) - known):
        yield name, _COUNT
    for name in _sites(at):
        if name not in known:
            yield (
                name,
                _Rule("text") if name == getattr(layout.overlay.sites, "types", "") else _LAYER,
            )


def _singles(at: TextModel) -> Iterator[tuple[str, _Rule]]:
    """(field, rule) of numbers that are one for all layers."""
    law, scale = at.layout.overlay.law, at.layout.fields.get("routed_scale")
    yield "topk_group", _Rule(_COUNT.kind, 0, EXPERTS)
    for name in (scale, law.least_sum, law.near, "swiglu_alpha", "swiglu_limit"):
        if name:
            yield name, _Rule("number")


def _sites(at: TextModel) -> Iterator[str]:
    """Fields that say which layers hold experts."""
    said = at.layout.overlay.sites
    for part in dataclasses.fields(said):
        if part.name == "dense_width":
            continue
        value = getattr(said, part.name)
        yield from value if isinstance(value, tuple) else filter(None, [value])


def _check(rule: _Rule, name: str, value: Any, file: str) -> None:
    values = value if isinstance(value, list) else [value]
    for one in values:
        if one is not None and not rule.fits(one):
            raise _wrong(name, rule.expected, one, file)
    if len(values) > LAYERS:
        raise _wrong(name, f"at most {LAYERS:,} values", f"{len(values):,}", file)


def _check_product(at: TextModel, file: str) -> None:
    layers, experts = at.field("layers") or 0, at.field("experts") or 0
    if layers * experts > IN_ALL:
        found = f"{layers:,} layers of {experts:,} experts"
        raise _wrong(at.layout.fields["experts"], f"at most {IN_ALL:,} in all layers", found, file)


def _check_sites(at: TextModel, file: str) -> None:
    said, text = at.layout.overlay.sites, at.text
    for key in ("dense_list", "list", "types"):
        name = getattr(said, key, None)
        if name and text.get(name) is not None and not isinstance(text[name], list):
            raise _wrong(name, "a list", text[name], file)
    single = [n for n in _sites(at) if isinstance(text.get(n), list)]
    lists = {getattr(said, key, None) for key in ("dense_list", "list", "types")}
    for name in single:
        if name not in lists or None in text[name]:
            raise _wrong(name, "one number" if name not in lists else "no null", text[name], file)
    layers = at.field("layers") or 0
    beyond = [layer for layer in at.moe_layers() if not 0 <= layer < layers]
    if beyond:
        raise _wrong("the list of MoE layers", f"below {layers}", beyond[0], file)


def _wrong(name: str, expected: str, found: Any, file: str) -> MoetoolError:
    return MoetoolError(
        "a field of the config cannot be what it is",
        file=file,
        field=name,
        expected=expected,
        found=str(found)[:80] if not isinstance(found, str) else repr(found)[:80],
        hint="restore config.json from the original model",
    )
