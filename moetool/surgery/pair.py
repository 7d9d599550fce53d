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
from math import sqrt
from typing import Any

from moetool.errors import MoetoolError
from moetool.surgery.family import filled
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
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """An exact conversion between two families; every key of its file is a field here."""

    source: str
    target: str
    require: tuple[dict[str, Any], ...] = ()
    drop: dict[str, str] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    carry: tuple[str, ...] = ()
    rename: dict[str, str] = field(default_factory=dict)
    rope_partial: bool = False
    rope_partial_default: float | None = None
    tensors: dict[str, tuple[Piecewise, ...]] = field(default_factory=dict)
    inner: str | None = None
    prefix: str = ""
    evidence: str = ""
    preferred: int = 0

    @property
    def name(self) -> str:
        """`llama -> mixtral`."""
        return f"{self.source} -> {self.target}"

    def refusals(self, source: Layout, config: dict[str, Any]) -> list[str]:
        """Why this source cannot become this target without loss; empty when it can."""
        text = source.text(config)
        found = []
        for rule in self.require:
            value = text.get(rule["field"])
            if isinstance(value, list) and "each" in rule:
                wrong = sorted({str(v) for v in value if v != rule["each"]})
                if wrong:
                    found.append(f"{rule['field']} holds {', '.join(wrong)}: {rule['because']}")
            elif "is" in rule and value not in rule["is"]:
                found.append(f"{rule['field']}={json.dumps(value)}: {rule['because']}")
        partial = rope(source, config).get("partial_rotary_factor", 1.0)
        if not self.rope_partial and partial not in (None, 1.0):
            found.append(f"partial_rotary_factor={partial}: {self.target} rotates whole heads")
        return found


@dataclass(frozen=True)
class Config:
    """The result of mapping a config: the new one, and what was left out, with reasons."""

    value: dict[str, Any]
    dropped: dict[str, str]


def rope(source: Layout, config: dict[str, Any]) -> dict[str, Any]:
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
    pair: Pair, source: Layout, target: Layout, config: dict[str, Any], decided: dict[str, Any]
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
    given = _inside(config, source.text_config)
    known_source, known_target = (
        _inside(source.defaults, source.text_config),
        _inside(target.defaults, target.text_config),
    )
    effective = source.text(config)
    out: dict[str, Any] = {}
    dropped: dict[str, str] = {}
    for name in sorted(set(effective) | set(given)):
        real = source.aliases.get(name, name)
        value = given.get(name, effective.get(name))
        if real in _ROPE or name in _ROPE:
            continue
        if real != name and (real in given or real in known_target or real in pair.rename):
            continue
        if name in _REMADE:
            dropped[name] = _REMADE[name]
        elif name in pair.rename:
            out[pair.rename[name]] = value
        elif name in pair.drop:
            dropped[name] = pair.drop[name]
        elif any(rule["field"] == name for rule in pair.require) and name not in known_target:
            dropped[name] = f"checked: {value!r} has no effect in {pair.target}"
        elif (
            name in known_target or name in pair.carry or name in _BASE or name not in known_source
        ):
            if name in given or name in known_target:
                out[name] = value
        else:
            raise MoetoolError(
                "a config field has no rule",
                file="config.json",
                found=f"{name}={value!r}",
                expected=f"a rule in archs/pairs/{pair.source}--{pair.target}.json",
                hint="report this as a bug of moetool",
            )
    _write_rope(out, rope(source, config), known_target, pair)
    if "head_dim" in known_target and out.get("head_dim") is None:
        out["head_dim"] = source.evaluate(
            "head_dim", effective
        )  # Mixtral's long rope reads it and computes nothing itself
    out |= pair.set | target.overlay.fixed | decided
    if target.text_config:
        whole = {k: v for k, v in config.items() if k != target.text_config}
        inner_type = _inside(target.defaults, target.text_config).get("model_type")
        out = (
            whole | {target.text_config: {"model_type": inner_type} | out}
            if inner_type
            else whole | {target.text_config: out}
        )
        if "tie_word_embeddings" in config:
            out["tie_word_embeddings"] = config["tie_word_embeddings"]
    return Config(
        {"architectures": [target.cls], "model_type": target.model_type}
        | {k: v for k, v in out.items() if k not in ("architectures", "model_type")},
        dropped,
    )


def _inside(config: dict[str, Any], path: str) -> dict[str, Any]:
    for part in filter(None, path.split(".")):
        config = config.get(part) or {}
    return config


def _write_rope(
    out: dict[str, Any], settings: dict[str, Any], known_target: dict[str, Any], pair: Pair
) -> None:
    """Both spellings: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling`
    (transformers 4, vLLM, llama.cpp).
    """
    if not settings:
        return
    if pair.rope_partial_default is not None:
        settings = {"partial_rotary_factor": pair.rope_partial_default} | settings
        out["partial_rotary_factor"] = settings["partial_rotary_factor"]
    out["rope_parameters"] = settings
    if any(isinstance(v, dict) for v in settings.values()):
        return
    out["rope_theta"] = settings.get("rope_theta", 10000.0)
    if settings.get("rope_type", "default") != "default":
        out["rope_scaling"] = {
            k: v for k, v in settings.items() if k not in ("rope_theta", "partial_rotary_factor")
        }


def map_tensor(
    pair: Pair, source: Layout, target: Layout, name: str, text: dict[str, Any]
) -> Iterator[tuple[str, tuple[int, int] | None, str, dict[str, Any]]]:
    """Yield (target name, row range, op, params) for one trunk tensor. MoetoolError for a tensor
    without a place.
    """
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
        yield new, span, piece.op, {k: _number(v, text) for k, v in piece.params.items()}


def _number(value: Any, text: dict[str, Any]) -> Any:
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
    found = []
    for path in sorted((DATA / "pairs").glob("*.json")):
        data = json.loads(path.read_text())
        tensors = {
            k: tuple(
                Piecewise(**(v | {"rows": tuple(v["rows"])} if "rows" in v else v)) for v in vs
            )
            for k, vs in data.pop("tensors", {}).items()
        }
        try:
            found.append(
                Pair(
                    tensors=tensors,
                    require=tuple(data.pop("require", ())),
                    carry=tuple(data.pop("carry", ())),
                    **data,
                )
            )
        except TypeError as problem:
            raise MoetoolError(
                f"a conversion is not well formed: {problem}", file=path, hint="correct the file"
            ) from None
    return tuple(sorted(found, key=lambda p: (p.source, p.preferred, p.target)))
