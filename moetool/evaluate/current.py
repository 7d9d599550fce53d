"""Is an output that stands already what its sources would give now?

Its plan's digest knows headers, options and decisions. Weights that changed under the same headers,
or another tokenizer, it cannot see: those are looked at here, before anybody is told that there is
nothing to do.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetool.data import JsonObject
from moetool.errors import UsageError, VerificationFailed
from moetool.evaluate import ranges
from moetool.surgery import containers, identity
from moetool.surgery.checkpoint import Checkpoint, read_json

if TYPE_CHECKING:
    from moetool.methods.prepared import Prepared


@dataclass(frozen=True)
class Change:
    """What is no longer as it was when the output was made."""

    file: str | Path
    what: str


def check(prepared: Prepared, out: Path) -> None:
    """Refuse to call an output finished whose sources have changed; UsageError says what has.

    Sources of which nothing was written since are known by their seals (surgery/identity.py); where
    something was, every byte of the output is held against them.
    """
    found = _companions(prepared, out) or _weights(prepared, out)
    if found is not None:
        raise UsageError(
            f"an output of this plan is there, but {found.what} has changed since it was made",
            file=out,
            expected="what it was made from",
            found=found.file,
            hint="--overwrite makes it again, or choose another output folder",
        )


def _companions(prepared: Prepared, out: Path) -> Change | None:
    """The files that travel with the weights."""
    base = prepared.sources[0]
    alone = containers.of(prepared.plan.container).is_model
    for name in base.travelling() if alone else ():
        mine, theirs = out / name, Path(base.folder) / name
        own = name in prepared.made.files or name == "README.md"
        if not own and not (mine.is_file() and filecmp.cmp(mine, theirs, shallow=False)):
            return Change(theirs, "a file that travels with the weights")
    return None


def _weights(prepared: Prepared, out: Path) -> Change | None:
    record = read_json(out / "moetool.json", what="record of moetool")
    named = prepared.named
    kept = [*record["sources"], *record.get("extra", ())]
    read = (*prepared.origins, *prepared.sources[named:])
    for source, known in zip(read, kept, strict=False):
        seal = known.get("content")  # 0.2.0 knew headers only
        if seal is not None and seal != identity.content(source):
            return Change(source.folder, "the weights of a source")
    sealed = all("content" in known for known in kept)
    if sealed and not _touched(prepared.origins, out / "moetool.json"):
        return None
    return _bytes(prepared, out, record, named)


def _touched(sources: Iterable[Checkpoint], record: Path) -> bool:
    return any(identity.touched_since(source, record) for source in sources)


def _bytes(prepared: Prepared, out: Path, record: JsonObject, named: int) -> Change | None:
    device = prepared.options.common.device
    theirs = ranges.Against(prepared.sources, named, record.get("sealed", {}), device)
    try:
        ranges.compare_bytes(prepared.made.plan, Checkpoint.open(out), theirs)
    except VerificationFailed as problem:
        where = problem.where.get("tensor") or problem.where.get("file")
        return Change(str(where), "what a tensor is made of")
    return None
