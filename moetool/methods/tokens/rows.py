"""Rows for new tokens, made of those that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetool.errors import UsageError
from moetool.surgery.spec import rows

if TYPE_CHECKING:
    import numpy as np

    from moetool.surgery.checkpoint import Checkpoint
    from moetool.surgery.spec import Stored

_AT_ONCE = 1 << 22  # numbers of a table that are looked at together
_RARE = 0.1  # of the middle row's length: rows that are shorter were hardly trained
_COMPARED = 2_000  # new tokens among which distances are compared


@dataclass(frozen=True)
class Spread:
    """Mean and deviation of each column of a table [width]."""

    mean: np.ndarray
    deviation: np.ndarray


def _blocks(source: Checkpoint, table: Stored) -> Iterator[np.ndarray]:
    """A table in float64, a bounded number of rows at a time; a bias as a column."""
    height = max(1, _AT_ONCE * table.shape[0] // table.elements)
    for start in range(0, table.shape[0], height):
        stop = min(start + height, table.shape[0])
        yield source.numbers(rows(table, start, stop)).reshape(stop - start, -1)


def spread(source: Checkpoint, table: Stored) -> Spread:
    """Of all rows of a table."""
    import numpy as np

    count = table.shape[0]
    mean = sum(block.sum(0) for block in _blocks(source, table)) / count
    far = sum(np.square(block - mean).sum(0) for block in _blocks(source, table)) / count
    return Spread(np.asarray(mean), np.sqrt(far))


def drawn(found: Spread, count: int, seed: int) -> np.ndarray:
    """[count, width] numbers with mean and deviation of each column."""
    from moetool.kernels import draw

    width = len(found.mean)
    noise = draw.normal(count * width, seed, f"tokens/{width}").reshape(count, width)
    made: np.ndarray = found.mean + noise * found.deviation
    return made


def anchors(source: Checkpoint, table: Stored, count: int, seed: int) -> np.ndarray:
    """Numbers of so many rows, drawn at random from those that were trained, ascending.

    UsageError where the table is of one row alone.
    """
    import numpy as np

    from moetool.kernels import draw

    length = np.concatenate([np.linalg.norm(b, axis=1) for b in _blocks(source, table)])
    trained = np.flatnonzero(length > _RARE * np.median(length))
    if len(trained) < 2:
        raise UsageError(
            "all rows of the embeddings are zero: new tokens cannot be compared with them",
            tensor=table.name,
            expected="--init normal",
            found="--init gw",
            hint="use a trained model",
        )
    order = draw.permutation(len(trained), seed, "tokens/anchors")
    return np.sort(trained[order[:count]])


def picked(source: Checkpoint, table: Stored, numbers: np.ndarray) -> np.ndarray:
    """Some rows of a table, float64; of a bias a column."""
    import numpy as np

    each = [source.numbers(rows(table, int(n), int(n) + 1)).reshape(-1) for n in numbers]
    return np.stack(each)


def placed(plan: np.ndarray, there: np.ndarray) -> np.ndarray:
    """plan [new, anchors], rows of the anchors [anchors, width] -> each new row where the plan has
    it, stretched about the mean of all to the anchors' spread, which mixing had made smaller.
    """
    import numpy as np

    made = plan @ there * len(plan)
    middle = made.mean(0)
    now = np.square(made - middle).mean()
    ratio = np.sqrt(np.square(there - there.mean(0)).mean() / now) if now > 0 else 1.0
    stretched: np.ndarray = there.mean(0) + (made - middle) * ratio
    return stretched


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of the distances among points of one cloud with those in another."""
    import numpy as np

    def far(points: np.ndarray) -> np.ndarray:
        held = points[:_COMPARED] - points[:_COMPARED].mean(0)
        squares = np.square(held).sum(1)
        square = squares[:, None] + squares[None, :] - 2.0 * held @ held.T
        found: np.ndarray = square[np.triu_indices(len(held), 1)]
        return found

    first, second = far(one), far(other)
    if min(first.std(), second.std()) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def vectors(file: Checkpoint, path: str) -> Stored:
    """The one matrix of a file. UsageError where it holds something else."""
    from moetool.surgery.spec import FLOATS

    found: Sequence[Stored] = [*file.tensors.values()]
    if len(found) != 1 or len(found[0].shape) != 2 or found[0].dtype not in FLOATS:
        said = ", ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in found[:4]) or "none"
        raise UsageError(
            "--vectors holds something else",
            file=path,
            expected=f"one tensor [tokens, width] of {', '.join(FLOATS)}",
            found=said,
            hint="save the codebook alone",
        )
    return found[0]
