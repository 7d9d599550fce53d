"""How one family's checkpoint becomes another's: trunk tensors and config fields, as data in
archs/pairs/.

Default: a tensor or field that both families know keeps its name and value. Everything else must
be named in the pair: required to have a harmless value, dropped with a reason, set, renamed or
folded. What is not named is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.family import Slot, filled
from moetool.surgery.layout import DATA, Layout, is_dead

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
# Fields of every transformers config: they say nothing about the function, and travel as they are.
_BASE = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_REMADE = {
    "architectures": "the target has its own class",
    "model_type": "the target has its own",
    "auto_map": "no custom code is needed: the target class is native",
}
_OWN_QUANTISER = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Piecewise:
    """One output of a trunk tensor: `rows` are formulas; `op` is a surgery operation with `params`."""

    to: str
    rows: tuple[str, str] | None = None
    op: str = "copy"
    params: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class Condition:
    """What a config field of the source must hold: one of the values `values` (`is` in the file),
    or a list whose every item is `each`; `because` says why.
    """

    field: str
    because: str
    values: tuple[Any, ...] | None = None
    each: str | None = None

    @classmethod
    def read(cls, data: JsonObject) -> Condition:
        """From an entry of `require`; TypeError for a key that is not known."""
        rest = dict(data)
        return cls(values=tuple(rest.pop("is")) if "is" in rest else None, **rest)

    def refusal(self, value: Any) -> str | None:
        """Why a value cannot be carried over; None when it can."""
        if self.each is not None and isinstance(value, list):
            wrong = sorted({str(v) for v in value if v != self.each})
            return f"{self.field} holds {', '.join(wrong)}: {self.because}" if wrong else None
        if self.values is not None and value not in self.values:
            return f"{self.field}={json.dumps(value)}: {self.because}"
        return None


@dataclass(frozen=True)
class Pair:
    """An exact conversion between two families; every key of its file is a field here."""

    source: str
    target: str
    require: tuple[Condition, ...] = ()
    drop: dict[str, str] = field(default_factory=dict)
    set: JsonObject = field(default_factory=dict)
    carry: tuple[str, ...] = ()
    rename: dict[str, str] = field(default_factory=dict)
    rope_partial: bool = False
    rope_partial_default: float | None = None
    tensors: dict[str, tuple[Piecewise, ...]] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()  # target tensors of each layer that the source has none for
    inner: str | None = None
    prefix: str = ""
    evidence: str = ""  # the test that shows it
    measured: str = ""  # how far the logits were apart
    preferred: int = 0

    @property
    def name(self) -> str:
        """`llama -> mixtral`."""
        return f"{self.source} -> {self.target}"

    @property
    def folds(self) -> bool:
        """Whether trunk tensors are computed, not only copied (norms folded into them)."""
        return any(p.op != "copy" for p in chain.from_iterable(self.tensors.values()))

    def refusals(self, source: Layout, config: JsonObject) -> list[str]:
        """Why this source cannot become this target without loss; empty when it can."""
        text = source.text(config)
        found = [why for rule in self.require if (why := rule.refusal(text.get(rule.field)))]
        partial = rope(source, config).get("partial_rotary_factor", 1.0)
        if not self.rope_partial and partial not in (None, 1.0):
            found.append(f"partial_rotary_factor={partial}: {self.target} rotates whole heads")
        return found


@dataclass(frozen=True)
class Config:
    """The result of mapping a config: the new one, and what was left out, with reasons."""

    value: JsonObject
    dropped: dict[str, str]


def rope(source: Layout, config: JsonObject) -> JsonObject:
    """The rotary settings of a text config in one dict (rope_theta always present when the family
    rotates).
    """
    given: Any = config
    known: Any = source.defaults
    for part in filter(None, source.text_config.split(".")):
        given, known = given.get(part) or {}, known.get(part) or {}
    base = dict(known.get("rope_parameters") or {})
    own = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if any(isinstance(v, dict) for v in own.values()):
        return dict(own)
    settings = base | {"rope_type": own.get("type", "default")} | own
    settings.pop("type", None)
    for name in ("rope_theta", "partial_rotary_factor"):
        if given.get(name) is not None:
            settings[name] = own.get(name, given[name])
    return {k: v for k, v in settings.items() if v is not None}


def map_config(
    pair: Pair, source: Layout, target: Layout, config: JsonObject, decided: JsonObject
) -> Config:
    """The target's config. Every field of the source is used, or dropped by name; MoetoolError for
    one with no rule.

    `decided`: fields the method chose (expert count, widths, top-k); they win over everything.
    """
    if any(config.get(q) for q in _OWN_QUANTISER):
        raise MoetoolError(
            "the source is quantized",
            file="config.json",
            found="quantization_config",
            expected="float weights",
            hint="dequantize it first: from_pretrained(...).dequantize() and save_pretrained",
        )
    mapped = _Fields.of(pair, source, target, config)
    out, known = mapped.carried(), mapped.known_target
    if settings := rope(source, config):
        partial = pair.rope_partial_default
        beside = {} if partial is None else {"partial_rotary_factor": partial}
        out["rope_parameters"] = beside | settings
    if "head_dim" in known and out.get("head_dim") is None:
        # Mixtral's long rope reads it and computes nothing itself
        out["head_dim"] = source.evaluate("head_dim", mapped.effective)
    out |= pair.set | target.overlay.fixed | decided
    if target.text_config:
        out = _around(target, config, out)
    head = {"architectures": [target.cls], "model_type": target.model_type}
    rest = {k: v for k, v in out.items() if k not in head}
    return Config(head | rest, mapped.dropped)


def _around(target: Layout, config: JsonObject, text: JsonObject) -> JsonObject:
    """The whole config of a family that keeps its text model's in a part of it."""
    inner_type = _inside(target.defaults, target.text_config).get("model_type")
    head = {"model_type": inner_type} if inner_type else {}
    whole = {k: v for k, v in config.items() if k != target.text_config}
    return whole | {target.text_config: head | text}


@dataclass(frozen=True)
class _Fields:
    """The fields of a source's text config on their way: as `given`, and with the class's defaults
    (`effective`); what source and target know; what was `dropped`, with the reason.
    """

    pair: Pair
    source: Layout
    given: JsonObject
    effective: JsonObject
    known_source: JsonObject
    known_target: JsonObject
    dropped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, pair: Pair, source: Layout, target: Layout, config: JsonObject) -> _Fields:
        return cls(
            pair,
            source,
            _inside(config, source.text_config),
            source.text(config),
            _inside(source.defaults, source.text_config),
            _inside(target.defaults, target.text_config),
        )

    def carried(self) -> JsonObject:
        """The fields that go over, by their new names; the others are noted in `dropped`."""
        out = {}
        for name in sorted(set(self.effective) | set(self.given)):
            if self._is_spelling(name) or self._drops(name):
                continue
            value = self.given.get(name, self.effective.get(name))
            if name in self.pair.rename:
                out[self.pair.rename[name]] = value
            elif not self._is_known(name):
                raise MoetoolError(
                    "a config field has no rule",
                    file="config.json",
                    found=f"{name}={value!r}",
                    expected=f"a rule in archs/pairs/{self.pair.source}--{self.pair.target}.json",
                    hint="report this as a bug of moetool",
                )
            elif name in self.given or name in self.known_target:
                out[name] = value
        return out

    def _is_spelling(self, name: str) -> bool:
        """Whether a field is written otherwise: as rotary settings, or by its real name."""
        real = self.source.aliases.get(name, name)
        if real in _ROPE or name in _ROPE:
            return True
        elsewhere = real in self.given or real in self.known_target or real in self.pair.rename
        return real != name and elsewhere

    def _drops(self, name: str) -> bool:
        """Whether a field is left out, and note why."""
        checked = any(rule.field == name for rule in self.pair.require)
        if name in _REMADE:
            self.dropped[name] = _REMADE[name]
        elif name in self.pair.rename:
            return False
        elif name in self.pair.drop:
            self.dropped[name] = self.pair.drop[name]
        elif checked and name not in self.known_target:
            value = self.given.get(name, self.effective.get(name))
            self.dropped[name] = f"checked: {value!r} has no effect in {self.pair.target}"
        else:
            return False
        return True

    def _is_known(self, name: str) -> bool:
        """Whether a field may keep its name: the target has it, the pair says so, it belongs to
        every config, or the source's class does not know it either.
        """
        kept = name in self.known_target or name in self.pair.carry or name in _BASE
        return kept or name not in self.known_source


def _inside(config: JsonObject, path: str) -> JsonObject:
    for part in filter(None, path.split(".")):
        config = config.get(part) or {}
    return config


class Mapped(NamedTuple):
    """One output of a trunk tensor: its name, the rows it takes (None: all), and the surgery
    operation with its parameters.
    """

    name: str
    rows: tuple[int, int] | None
    op: str
    params: JsonObject


def map_tensor(
    pair: Pair, source: Layout, target: Layout, name: str, text: JsonObject
) -> Iterator[Mapped]:
    """What becomes of one trunk tensor. MoetoolError for a tensor without a place."""
    found = source.match(name)
    if found is None:
        raise MoetoolError(
            "a tensor is unknown to its family",
            tensor=name,
            expected=f"a name that {source.model_type} has",
            hint="if it is an adapter or a custom head, remove it first; moetool drops nothing silently",
        )
    pieces = pair.tensors.get(found.slot.name, (Piecewise(to=found.slot.name),))
    for piece in pieces:
        if piece.to not in {s.name for s in target.tensors}:
            raise MoetoolError(
                "a tensor has no place in the target",
                tensor=name,
                expected=f"{piece.to} in {target.model_type}",
                hint="choose another --target; `moetool archs show "
                + source.model_type
                + "` lists them",
            )
        new = filled(piece.to, **found.numbers)
        span = None
        if piece.rows:
            first, last = (0 if f == "0" else source.evaluate(f, text) or 0 for f in piece.rows)
            span = (first, last)
        params = {k: _number(v, text) for k, v in piece.params.items()}
        yield Mapped(new, span, piece.op, params)


def zeros(pair: Pair, target: Layout, text: JsonObject) -> Iterator[tuple[Slot, tuple[int, ...]]]:
    """Tensors of a layer that the source has none for, and that are zero in the target: a bias
    that some clients expect of every checkpoint. With their shapes under the source's fields.
    """
    slots = {slot.name: slot for slot in target.tensors}
    for name in pair.zeros:
        shape = target.shape(slots[name], text) if name in slots else None
        if shape is None or None in shape:
            raise MoetoolError(
                "a conversion adds a tensor that its target does not have, or has no shape for",
                tensor=name,
                expected=f"a tensor of {target.model_type}",
                hint=f"correct archs/pairs/{pair.source}--{pair.target}.json",
            )
        yield slots[name], tuple(n for n in shape if n is not None)


def _number(value: Any, text: JsonObject) -> Any:
    """`sqrt:hidden_size` -> the square root of that config field."""
    if isinstance(value, str) and value.startswith("sqrt:"):
        return sqrt(text[value[5:]])
    return value


def drops(name: str) -> str | None:
    """The reason why a tensor may be left out, if there is one."""
    return "a rotary buffer of old versions; every class computes it" if is_dead(name) else None


@lru_cache(maxsize=1)
def pairs() -> tuple[Pair, ...]:
    """Every conversion there is data for."""
    found = [_read(path) for path in sorted((DATA / "pairs").glob("*.json"))]
    return tuple(sorted(found, key=lambda p: (p.source, p.preferred, p.target)))


def _read(path: Path) -> Pair:
    data = json.loads(path.read_text())
    try:
        return Pair(
            tensors={k: tuple(map(_piecewise, vs)) for k, vs in data.pop("tensors", {}).items()},
            require=tuple(map(Condition.read, data.pop("require", ()))),
            carry=tuple(data.pop("carry", ())),
            zeros=tuple(data.pop("zeros", ())),
            **data,
        )
    except TypeError as problem:
        raise MoetoolError(
            f"a conversion is not well formed: {problem}", file=path, hint="correct the file"
        ) from None


def _piecewise(data: JsonObject) -> Piecewise:
    return Piecewise(**(data | {"rows": tuple(data["rows"])} if "rows" in data else data))
