"""One config for every client: transformers 5 says some things in one new place, or not at all,
where transformers 4, vLLM, llama.cpp and mlx-lm look for them under older names. Without those a
client takes its own default, without a word.

Rotary settings go from `rope_parameters` to `rope_theta`, `partial_rotary_factor` and
`rope_scaling`; what else a family's readers ask for is data (`said` and `derived` in
archs/overlay.json). Nothing that a config says is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.text_model import TextModel, any_text_model

_BESIDE = ("rope_theta", "partial_rotary_factor")  # they stand beside `rope_scaling`, not in it
_TIED = "tie_word_embeddings"
_OLD_TYPES = {"mrope": "default", "su": "longrope"}  # words of before, for the same


def completed(config: JsonObject) -> JsonObject:
    """The config with what its readers would miss; the same object where that is nothing.
    MoetoolError where two spellings of one thing contradict each other.
    """
    at = any_text_model(config, ())
    path = at.path if at else ()
    said = config
    for part in path:
        said = said.get(part) or {}
    _check(said)
    wanted = _rope(said) | (dict(_of_family(at)) if at else {})
    if _TIED in wanted:  # the whole model's word, and no other
        wanted[_TIED] = bool(config.get(_TIED))
    more = {k: v for k, v in wanted.items() if k not in said or (said[k] is None and v is not None)}
    return _put(config, path, said | more) if more else config


def _rope(said: JsonObject) -> JsonObject:
    """The older spelling of rotary settings; nothing where layers have settings of their own."""
    own = _settings(said)
    if not own:
        return {}
    scaling = {k: v for k, v in own.items() if k not in _BESIDE}
    plain = scaling.get("rope_type", "default") == "default" and len(scaling) <= 1
    beside = {k: own[k] for k in _BESIDE if own.get(k) is not None}
    return beside | {"rope_scaling": None if plain else scaling}


def _settings(said: JsonObject) -> JsonObject:
    """`rope_parameters`, where they are the same for all layers."""
    own = said.get("rope_parameters")
    if not isinstance(own, dict) or any(isinstance(v, dict) for v in own.values()):
        return {}
    return own


def _of_family(at: TextModel) -> Iterator[tuple[str, Any]]:
    """What the readers of a family ask for beside what its class in transformers 5 writes."""
    family = at.layout.overlay
    yield from family.said.items()
    for name, formula in family.derived.items():
        value = at.layout.evaluate(formula, at.text)
        if value is not None:
            yield name, value


def _check(said: JsonObject) -> None:
    """Refuse a config whose spellings say different things: clients would compute different
    models.
    """
    own = _settings(said)
    older = _older(said)
    for name in sorted(own.keys() & older.keys()):
        if own[name] is not None and own[name] != older[name]:
            raise MoetoolError(
                "the config says two things about the same rotary setting",
                file="config.json",
                expected=f"{name}={own[name]!r} of rope_parameters",
                found=f"{name}={older[name]!r} in the older spelling",
                hint="remove the one that is not the model's: clients read the one or the other",
            )


def _older(said: JsonObject) -> JsonObject:
    """Rotary settings as transformers 4 and before spelled them, under today's names."""
    scaling = {k: v for k, v in (said.get("rope_scaling") or {}).items() if v is not None}
    word = scaling.pop("type", None)
    kind = scaling.get("rope_type", word)
    if kind is not None:
        scaling["rope_type"] = _OLD_TYPES.get(kind, kind)
    return {k: said[k] for k in _BESIDE if said.get(k) is not None} | scaling


def _put(config: JsonObject, path: Sequence[str], text: JsonObject) -> JsonObject:
    """The config with another text part, its keys in the same order."""
    if not path:
        return text
    return config | {path[0]: _put(config.get(path[0]) or {}, path[1:], text)}
