"""All that is measured of a staged output, before anything can load it: what was rounded is read
back, and text is sent through it.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moetool.data import JsonObject
from moetool.errors import MoetoolError, VerificationFailed
from moetool.methods.prepared import Prepared
from moetool.methods.proof import Loaded, Proof
from moetool.surgery.checkpoint import Checkpoint

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from moetool.progress import Progress


class Measured(NamedTuple):
    """What was found; None for what nobody asked for."""

    quality: JsonObject | None = None
    proof: Proof | None = None
    warnings: tuple[str, ...] = ()


def of(
    prepared: Prepared,
    opened: Callable[[], Checkpoint],
    *,
    tell: Progress,
    stop: threading.Event | None,
) -> Measured:
    """Open what was written, and measure what the method asks for. Raises VerificationFailed where
    it is not what it should be.
    """
    promised, gate = prepared.made.promised, prepared.method.gate
    if prepared.made.compared and gate is None:
        return _born(prepared, opened(), tell, stop)
    if not promised and gate is None:
        return Measured()
    written = _read(prepared, opened) if promised else opened()
    proof = _proof(prepared, written, tell, stop) if promised else None
    if gate is None:
        return Measured(None, proof)
    from moetool.evaluate import gate as gates

    return Measured(gates.measure(prepared, written, tell=tell, stop=stop), proof)


def _born(
    prepared: Prepared, written: Checkpoint, tell: Progress, stop: threading.Event | None
) -> Measured:
    """How far it is from its source; where that cannot be measured, why."""
    from moetool.evaluate import birth

    found = birth.measure(prepared, written, tell=tell, stop=stop)
    if isinstance(found, str):
        return Measured(warnings=(f"how far it is from its source was not measured: {found}",))
    return Measured(found)


def kept_for_others(work: Path) -> str:
    """The end of a hint: what was found on a text does not hang on gates, and took long."""
    shutil.rmtree(work / "gate", ignore_errors=True)
    if not (work.is_dir() and any(found.is_dir() for found in work.iterdir())):
        return ""
    return (
        f"; {work} keeps what was found on the text, and the same command with another gate goes "
        "on from there: remove it if you do not want to"
    )


def promise(prepared: Prepared) -> int:
    """Peak bytes of reading back, or of measuring a birth; 0 where nothing is."""
    if prepared.made.compared:
        from moetool.evaluate import birth

        return birth.promise(prepared)
    if not prepared.made.promised:
        return 0
    from moetool.evaluate import readback

    return readback.promise(prepared.made.promised, prepared.jobs, _memory(prepared))


def _memory(prepared: Prepared) -> int | None:
    return prepared.options.common.memory


def _read(prepared: Prepared, opened: Callable[[], Checkpoint]) -> Checkpoint:
    """The finished shards; headers that do not hold together are a missed check."""
    try:
        return opened()
    except VerificationFailed:
        raise
    except MoetoolError as problem:
        where = problem.where | {"file": prepared.options.out}
        raise VerificationFailed(
            f"what was written cannot be read: {problem.message}", **where, hint=problem.hint
        ) from None


def _proof(
    prepared: Prepared, written: Checkpoint, tell: Progress, stop: threading.Event | None
) -> Proof:
    from moetool.evaluate import readback

    made = prepared.made
    workers = readback.workers(made.promised, prepared.jobs, _memory(prepared))
    output = readback.Output(
        prepared.plan, made.promised, prepared.sources, written, prepared.options.out
    )
    proof = readback.read_back(output, readback.Readers(workers, tell, stop))
    return replace(proof, loaded=_loaded(prepared, written, tell, stop))


def _loaded(
    prepared: Prepared, written: Checkpoint, tell: Progress, stop: threading.Event | None
) -> Loaded | None:
    """What the named loader makes of it; None where nobody asked."""
    if not prepared.made.loader:
        return None
    from moetool.evaluate import loaded

    scratch = Path(prepared.work)  # goes with a finished run, so what a kill leaves there goes too
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        within = loaded.Within(str(scratch), _memory(prepared), tell, stop)
        return loaded.check(written, prepared.made.config, prepared.made.loader, within)
    finally:
        with contextlib.suppress(OSError):
            scratch.rmdir()
