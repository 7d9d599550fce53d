"""A checkpoint whose matrices read as an output would hold them: rounded while they are read, and
written nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from moetool.methods.quantize.choice import Choice
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.forms import Spelled
from moetool.surgery.spec import Piece, whole

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RoundedRun:
    """A matrix to round: where it lies in its tensor, and its format."""

    piece: Piece
    asked: Spelled

    @property
    def stop(self) -> int:
        return self.piece.offset + self.piece.count


@dataclass(frozen=True)
class RoundedView(Checkpoint):
    """`runs`: by the stored tensor in which they begin."""

    runs: Mapping[str, Sequence[RoundedRun]] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Checkpoint, choice: Choice) -> RoundedView:
        """A model as it would be with these formats."""
        runs: dict[str, list[RoundedRun]] = {}
        for name, asked in choice.formats.items():
            piece = choice.matrices[name].piece
            runs.setdefault(piece.name, []).append(RoundedRun(piece, asked))
        return cls(**{f.name: getattr(source, f.name) for f in fields(source)}, runs=runs)

    def matrix(self, what: str | Piece, device: str = "cpu") -> Tensor:
        """As `Checkpoint.matrix`, rounded: float32 where anything is."""
        piece = whole(self.tensor(what)) if isinstance(what, str) else what
        found = super().matrix(piece, device)
        start, stop = piece.offset, piece.offset + piece.count
        touched = [
            r for r in self.runs.get(piece.name, ()) if r.piece.offset < stop and start < r.stop
        ]
        if not touched:
            return found
        flat = found.float().reshape(-1).clone()
        for run in touched:
            first = run.piece.offset
            made = self._held(run, device).reshape(-1)
            a, b = max(first, start), min(run.stop, stop)
            flat[a - start : b - start] = made[a - first : b - first]
        return flat.reshape(piece.shape)

    def _held(self, run: RoundedRun, device: str) -> Tensor:
        return held(super().matrix(run.piece, device), run.asked)


def held(matrix: Tensor, asked: Spelled) -> Tensor:
    """The values of a matrix [..., out, in] in a format, under searched scales; float32."""
    from moetool.kernels import rounding

    wide, form = matrix.float(), forms.named(asked.form)
    grid = form.grid(tuple(matrix.shape), asked.params)
    if grid is not None:
        return rounding.values(rounding.searched(wide, grid), grid)
    return form.decode(form.encode(wide, asked.params), asked.params).float().reshape(matrix.shape)
