"""Decisions from a file, held against what they are replayed with: the verb, its ways, the model."""

from __future__ import annotations

from moetool.errors import UsageError
from moetool.methods.reduce import budget, counts, decided
from moetool.methods.reduce.decided import Decided
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
