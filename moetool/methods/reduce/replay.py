"""Decisions from a file, held against what they are replayed with: the verb, its ways, the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moetool.errors import UsageError
from moetool.forward import drawn
from moetool.methods.reduce import budget, counts, decided
from moetool.methods.reduce.decided import Decided
from moetool.methods.reduce.options import LOOKS
from moetool.methods.reduce.way import Way
from moetool.surgery.experts import Mixture

AGAIN = "make them again with --dry-run --decisions FILE"


def read(file: str, verb: str, way: Way, mixture: Mixture) -> Decided:
    """The decisions of a file; UsageError where they are another verb's, another model's, or say
    what no way of this verb can write.
    """
    found = decided.read(file)
    if found.verb not in ("", verb):
        raise UsageError(
            "these decisions are another verb's",
            file=file,
            expected=verb,
            found=found.verb,
            hint=f"replay them with `moetool {found.verb}`, or {AGAIN}",
        )
    _check_writable(found, file, verb, way)
    found.check(mixture, file)
    counts.checked_counts(found, mixture)
    writer = way.writer(found)
    if type(writer) is not type(way):
        writer.check(mixture)
    return found


def _check_writable(found: Decided, file: str, verb: str, way: Way) -> None:
    written = frozenset[str]().union(*(known.writes for known in way.known().values()))
    for number, layer in sorted(found.layers.items()):
        strange = sorted(layer.more() - written)
        if strange:
            raise UsageError(
                f"{verb} does not write what these decisions say",
                file=file,
                tensor=f"layer {number}",
                expected=", ".join(sorted({"keep", *written})),
                found=strange[0],
                hint=f"they are another verb's, or {AGAIN}",
            )


def contradiction(found: Decided, mixture: Mixture, ratio: float, usual: float) -> list[str]:
    """What the user must be told where --ratio says something else than the decisions; a ratio
    that is the usual one was not told.
    """
    layers = [found.layers[n] for n in mixture.layers]
    kept = sum(layer.count - len(layer.constant) for layer in layers)
    if ratio == usual or kept == budget.uniform(mixture, ratio) * len(layers):
        return []
    return [
        f"--ratio {ratio:g} is not used: the decisions keep {kept} of "
        f"{mixture.experts * len(layers)} experts"
    ]


# --- a refit that decisions were made for


@dataclass(frozen=True)
class Replay:
    """What a replay that is given no text does. `moved`: it only moves experts; `on`: what stands
    for text, and `usual`: how much of it, where nobody says otherwise.
    """

    moved: bool = False
    on: str = drawn.OWN
    usual: Mapping[str, object] = field(default_factory=dict)


def planned(values: Mapping[str, object], ways: Mapping[str, type[Way]]) -> Replay:
    """Of the options of a verb: a refit on no text can be made again, one on text cannot."""
    file = Path(str(values.get("decisions") or ""))
    if not file.is_file():
        return Replay()
    try:
        said = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return Replay(moved=True)  # who reads the file says what is wrong with it
    way = ways.get(str(said.get("method"))) if isinstance(said, dict) else None
    told = (said.get("refit") if isinstance(said, dict) else None) or {}
    on = str(told.get("on")) if isinstance(told, dict) else ""
    looks = any(values.get(name) for name in LOOKS)
    if drawn.means(on) and not looks and values.get("refit") is not False:
        usual = {k: told[k] for k in ("tokens", "seq_len") if type(told.get(k)) is int}
        return Replay(False, on, usual)
    return Replay(moved=way is None or not way.solves)


def without(found: Decided, *, refits: bool, seed: int) -> list[str]:
    """What the user must be told of a refit that decisions were made for and that is another one
    now, or none.
    """
    on, known = found.refit.get("on", ""), found.refit.get("seed", seed)
    if on and not refits:
        what = "what the model writes" if drawn.means(on) else "text"
        return [
            f"the decisions were made for a refit on {what}, and there is none here: the experts "
            "that stay move byte for byte (--calibrate FILE refits them)"
        ]
    if refits and drawn.means(on) and known != seed:
        return [f"the decisions were made with --seed {known}: their refit was on other tokens"]
    return []
