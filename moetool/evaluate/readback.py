"""Every rounded matrix of an output, decoded from the bytes that were written and held against its
source, before the output has a name.

What a way solved for is copied: it must be there byte for byte, and its error is only told. What
was rounded must lie at the levels nearest to its source under the scales that were stored. A matrix
is in memory at a time for each worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from moetool.errors import MoetoolError, Stopped, VerificationFailed
from moetool.evaluate import ranges
from moetool.methods.proof import Pledge, Proof, ReadBack
from moetool.progress import Progress, Stage, silent
from moetool.surgery import forms, ops, threads
from moetool.surgery.checkpoint import Checkpoint, read_range
from moetool.surgery.plan import Plan
from moetool.surgery.spec import Stored, whole

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.kernels.distance import Distance
    from moetool.kernels.grid import Grid

_COARSE = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # relative rounding of a dtype
_HELD = 16  # bytes of memory a weight: the source's, the codes, what they are unpacked from
_AGAIN = "the disk, or the memory of this machine, may be faulty: make the output again"


@dataclass(frozen=True)
class Readers:
    """How to read back: workers, and who hears of it."""

    workers: int = 1
    tell: Progress = silent
    stop: threading.Event | None = None


@dataclass(frozen=True)
class Output:
    """What was planned, what it was made of, and what lies on the disk."""

    plan: Plan
    promised: Sequence[Pledge]
    sources: Sequence[Checkpoint]
    written: Checkpoint
    named: str = ""  # the output's own name, for messages


def promise(promised: Sequence[Pledge], jobs: int, memory: int | None) -> int:
    """Peak bytes of reading back with as many of `jobs` workers as `memory` allows."""
    widest = sorted((_weights(p) for p in promised), reverse=True)
    base = ops.RESERVE + ops.NUMPY_RESERVE + ops.TORCH_RESERVE + 2000 * len(promised)
    return base + _HELD * sum(widest[: workers(promised, jobs, memory)])


def workers(promised: Sequence[Pledge], jobs: int, memory: int | None) -> int:
    """How many of `jobs` workers `memory` allows; at least one."""
    widest = max(map(_weights, promised), default=1)
    base = ops.RESERVE + ops.NUMPY_RESERVE + ops.TORCH_RESERVE + 2000 * len(promised)
    fit = jobs if memory is None else (memory - base) // (_HELD * widest)
    return max(1, min(jobs, fit))


def read_back(output: Output, how: Readers = Readers()) -> Proof:
    """Hold everything against its source. Raises VerificationFailed at the first matrix that is
    missing, lies otherwise than planned, or is farther from its source than rounding explains, and
    for any byte that was only moved and is another.
    """
    _headers(output)
    moved = ranges.compare_moved(output.plan, output.written, output.sources)
    return Proof(errors(output, how), moved)


def errors(output: Output, how: Readers = Readers()) -> tuple[ReadBack, ...]:
    """The matrices alone, in the order in which they are promised."""
    stored = [_found(output, p) for p in output.promised]
    counter = _Told(how, sum(map(_weights, output.promised)))

    def one(promised: Pledge, lying: Stored) -> ReadBack:
        counter.check()
        made = _held(output, promised, lying)
        counter(_weights(promised))
        return made

    with threads.single(), ThreadPoolExecutor(how.workers) as pool:
        return tuple(_all(pool, one, output.promised, stored))


def _all(
    pool: ThreadPoolExecutor,
    one: Callable[[Pledge, Stored], ReadBack],
    promised: Sequence[Pledge],
    stored: Sequence[Stored],
) -> list[ReadBack]:
    """In order; the first failure ends the rest."""
    futures = [pool.submit(one, *pair) for pair in zip(promised, stored, strict=True)]
    try:
        return [f.result() for f in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


@dataclass
class _Told:
    """Adds up weights from many threads."""

    how: Readers
    total: int
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, count: int) -> None:
        with self.lock:
            self.done += count
            self.how.tell(Stage("read back"), self.done, self.total)

    def check(self) -> None:
        if self.how.stop is not None and self.how.stop.is_set():
            raise Stopped("stopped", hint="run the same command again: what is written is kept")


def _headers(output: Output) -> None:
    """Each file begins with the very header that was planned."""
    for shard in output.plan.shards:
        header = output.plan.header(shard)
        path = f"{output.written.folder}/{shard.name}"
        if read_range(path, 0, len(header)) != header:
            raise _failed(output, "a file does not begin as planned", file=shard.name)


def _found(output: Output, promised: Pledge) -> Stored:
    """The matrix as a reader finds it by the config: in its form, the parts as planned."""
    stored = output.written.tensors.get(promised.name)
    if stored is None:
        raise _failed(output, "a matrix is not there", promised.name)
    like, planned = stored.parts, output.plan.targets
    expected = f"{promised.form} {list(promised.piece.shape)}"
    found = f"{like.form if like else 'full'} {list(stored.shape)}"
    for part in stored.lying:
        target = planned.get(part.name)
        if target is None or (target.dtype, target.shape) != (part.dtype, part.shape):
            expected = str(target)
            found = str(part)
    if found != expected:
        raise _failed(
            output,
            "a matrix is not read as it was planned",
            promised.name,
            expected=expected,
            found=found,
            hint="report this as a bug of moetool",
        )
    return stored


def _held(output: Output, promised: Pledge, lying: Stored) -> ReadBack:
    """One matrix against its source."""
    matrix = output.sources[promised.piece.source].matrix(promised.piece)
    try:
        apart = _distance(output.written, promised, lying, matrix)
    except MoetoolError as problem:
        raise _failed(output, problem.message, promised.name, **problem.where) from None
    relative = apart.relative
    if apart.astray:
        raise _failed(
            output,
            f"{apart.astray} weights of a matrix are not at the level nearest to their source's",
            promised.name,
            expected="each within half a step of its source",
            found=f"relative error {relative:.4g}",
        )
    most = _most(promised, matrix, relative)
    if not relative <= most:
        raise _failed(
            output,
            "a matrix is farther from its source than rounding explains",
            promised.name,
            expected=f"relative error at most {most:.4g}",
            found=f"{relative:.4g}",
        )
    return ReadBack(promised.name, promised.role, apart.error, apart.norm)


def _distance(written: Checkpoint, promised: Pledge, lying: Stored, matrix: Tensor) -> Distance:
    """By codes where the form tells them and they were rounded to; else by values."""
    from moetool.kernels import distance

    grid, like = _grid(promised), lying.parts
    if grid is not None and like is not None:
        parts = [_part(written, p) for p in like.tensors]
        form = forms.named(like.form)
        unpacked = form.unpack(parts, like.params)
        if unpacked is not None:
            dtype = form.computes or str(matrix.dtype).removeprefix("torch.")
            finely = promised.rounding and form.searched
            coarse = 0.0 if finely else _COARSE.get(dtype, 0.0)
            made = distance.of_codes(matrix, unpacked, grid, coarse)
            return made._replace(astray=0) if promised.solved else made
    return distance.of_values(matrix, written.matrix(whole(lying)))


def _part(written: Checkpoint, part: Stored) -> Tensor:
    from moetool.kernels import codec

    return codec.decode(written.read(whole(part)), part.dtype, part.shape)


def _most(promised: Pledge, matrix: Tensor, relative: float) -> float:
    """The largest relative error that is explained; solving moves weights so that others make up
    for it, and only losing all of a matrix is too much.
    """
    from moetool.kernels import distance

    if promised.solved:
        return 1.0
    grid = _grid(promised)
    if grid is None:
        bits = forms.named(promised.form).bits(promised.piece.shape, promised.params)
        return float(min(1.0, max(2 ** (5 - bits), _COARSE["bfloat16"])))
    usual = 3 * distance.half_gap(grid) / grid.full
    return usual if relative <= usual else distance.most(matrix, grid)


def _grid(promised: Pledge) -> Grid | None:
    """What a matrix was rounded to; None for stacks, which are held by their values."""
    if len(promised.piece.shape) != 2:
        return None
    return forms.named(promised.form).grid(promised.piece.shape, promised.params)


def _weights(promised: Pledge) -> int:
    return prod(promised.piece.shape)


def _failed(
    output: Output, what: str, tensor: str | None = None, hint: str = _AGAIN, **more: Any
) -> VerificationFailed:
    return VerificationFailed(
        what, **{"file": output.named or output.written.folder} | more, tensor=tensor, hint=hint
    )
