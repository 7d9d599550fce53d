"""One config for every client: transformers 5 says some things in one new place, or not at all,
where transformers 4, vLLM, llama.cpp and mlx-lm look for them under older names. Without those a
client takes its own default, without a word.

Rotary settings go from `rope_parameters` to `rope_theta`, `partial_rotary_factor` and
`rope_scaling`, or, where kinds of layers have their own, to the names that the family had for
them; those, and what else its readers ask for, are data (`ropes`, `said` and `derived` in
archs/overlay.json). Nothing that a config says is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.text_model import TextModel, any_text_model

_BESIDE = ("rope_theta", "partial_rotary_factor")  # they stand beside `rope_scaling`, not in it
_TIED = "tie_word_embeddings"
_OLD_TYPES = {"mrope": "default", "su": "longrope"}  # words of before, for the same
Ropes = Mapping[str, str]  # kind of layers -> the older name of its base (Overlay.ropes)


def completed(config: JsonObject) -> JsonObject:
    """The config with what its readers would miss; the same object where that is nothing.
    MoetoolError where two spellings of one thing contradict each other.
    """
    at = any_text_model(config, ())
    path, ropes = (at.path, at.layout.overlay.ropes) if at else ((), {})
    said = config
    for part in path:
        said = said.get(part) or {}
    _check(said, ropes)
    wanted = _rope(said, ropes) | (dict(_of_family(at)) if at else {})
    if _TIED in wanted:  # the whole model's word, and no other
        wanted[_TIED] = bool(config.get(_TIED))
    more = {k: v for k, v in wanted.items() if k not in said or (said[k] is None and v is not None)}
    return _put(config, path, said | more) if more else config


def _rope(said: JsonObject, ropes: Ropes) -> JsonObject:
    """The older spelling of rotary settings; nothing where it has no words for them."""
    own = _settings(said, ropes)
    if not own:
        return {}
    names = (*_BESIDE, *ropes.values())
    beside = {k: own[k] for k in names if own.get(k) is not None}
    return beside | {"rope_scaling": _scaling({k: v for k, v in own.items() if k not in names})}


def _scaling(own: JsonObject) -> JsonObject | None:
    """Settings without those that stand beside them, as `rope_scaling`: none of a plain rope."""
    scaling = {k: v for k, v in own.items() if k not in _BESIDE}
    plain = scaling.get("rope_type", "default") == "default" and len(scaling) <= 1
    return None if plain else scaling


def _settings(said: JsonObject, ropes: Ropes) -> JsonObject:
    """`rope_parameters`, the same for all layers or of the first kind of layers, beside the bases
    of the other kinds under their older names. Nothing where those cannot say it.
    """
    own = said.get("rope_parameters")
    if not isinstance(own, dict):
        return {}
    layered = [v for v in own.values() if isinstance(v, dict)]
    if not layered:
        return own
    if own.keys() != ropes.keys() or len(layered) < len(ropes):
        return {}
    parts: dict[str, JsonObject] = {older: own[kind] for kind, older in ropes.items()}
    first, *others = parts.values()
    if any(map(_scaling, others)) or any("partial_rotary_factor" in part for part in layered):
        return {}
    return first | {k: part["rope_theta"] for k, part in parts.items() if "rope_theta" in part}


def _of_family(at: TextModel) -> Iterator[tuple[str, Any]]:
    """What the readers of a family ask for beside what its class in transformers 5 writes."""
    family = at.layout.overlay
    yield from family.said.items()
    for name, formula in family.derived.items():
        value = at.layout.evaluate(formula, at.text)
        if value is not None:
            yield name, value


def _check(said: JsonObject, ropes: Ropes) -> None:
    """Refuse a config whose spellings say different things: clients would compute different
    models.
    """
    own = _settings(said, ropes)
    older = _older(said, ropes)
    for name in sorted(own.keys() & older.keys()):
        if own[name] is not None and own[name] != older[name]:
            raise MoetoolError(
                "the config says two things about the same rotary setting",
                file="config.json",
                expected=f"{name}={own[name]!r} of rope_parameters",
                found=f"{name}={older[name]!r} in the older spelling",
                hint="remove the one that is not the model's: clients read the one or the other",
            )


def _older(said: JsonObject, ropes: Ropes) -> JsonObject:
    """Rotary settings as transformers 4 and before spelled them, under today's names."""
    scaling = {k: v for k, v in (said.get("rope_scaling") or {}).items() if v is not None}
    word = scaling.pop("type", None)
    kind = scaling.get("rope_type", word)
    if kind is not None:
        scaling["rope_type"] = _OLD_TYPES.get(kind, kind)
    names = (*_BESIDE, *ropes.values())
    return {k: said[k] for k in names if said.get(k) is not None} | scaling


def _put(config: JsonObject, path: Sequence[str], text: JsonObject) -> JsonObject:
    """The config with another text part, its keys in the same order."""
    if not path:
        return text
    return config | {path[0]: _put(config.get(path[0]) or {}, path[1:], text)}
