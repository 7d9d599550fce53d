"""Values in a config read strictly: an unknown name and a value of the wrong kind are a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moetool.data import JsonObject
from moetool.errors import MoetoolError, did_you_mean

# Of each name: bool, int, float, str, list, or the words that the value may be.
Kinds = Mapping[str, type | tuple[str, ...]]
_LARGEST = 3.4e38  # that float32 holds
_MOST = 1 << 16  # of whole numbers: ranks, widths, groups
_HINT = "restore the config.json that came with the model"


def fits(value: object, kind: type | tuple[str, ...], least: int = 0) -> bool:
    """Whether a value is of a kind: whole numbers from `least` up, numbers that float32
    holds, one of the words.
    """
    if isinstance(kind, tuple):
        return value in kind
    if kind is float:
        if not isinstance(value, int | float) or type(value) is bool:
            return False
        return abs(value) <= _LARGEST
    if kind is int:
        return type(value) is int and least <= value <= _MOST
    return type(value) is kind


def check(said: JsonObject, needs: Kinds, knows: Kinds, what: str) -> None:
    """Refuse values without one that is needed, with one that is not known, or with one that is not
    of its kind. `what`: whose they are, for the sentence.
    """
    every = (*needs, *knows)
    lacking, unknown = [n for n in needs if n not in said], [n for n in said if n not in every]
    if lacking:
        raise _wrong(f"{what} lacks {lacking[0]!r}", ", ".join(needs), said)
    if unknown:
        found = f"{what} has the unknown key {unknown[0]!r}"
        raise _wrong(found, ", ".join(every), said, did_you_mean(unknown[0], every))
    for name, kind in {**needs, **knows}.items():
        if name in said and not fits(said[name], kind, int(name in needs)):
            wanted = kind.__name__ if isinstance(kind, type) else " or ".join(kind)
            raise _wrong(f"`{name}` of {what}", wanted, said[name])


def word(said: str, known: Sequence[str], what: str) -> None:
    """Refuse a word that is none of those known, with the nearest of them."""
    if said not in known:
        raise _wrong(f"no {what} {said!r}", ", ".join(known), said, did_you_mean(said, known))


def _wrong(what: str, expected: str, found: object, hint: str = "") -> MoetoolError:
    return edited(what, expected, repr(found) if found else "none", hint or _HINT)


def edited(what: str, expected: str, found: object, hint: str = "") -> MoetoolError:
    """What config.json says for moetool alone, and no moetool of this version has written."""
    return MoetoolError(
        what,
        file="config.json",
        expected=expected,
        found=str(found)[:200],
        hint=hint or "the config was written by another moetool, or edited",
    )
