"""Hidden states between two layers: in memory while they fit, beyond that in a file; kept on disk
after each layer for resuming.

The file is read and written at its offsets, not mapped: mapped pages would count against the
memory promise.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moetool import atomic
from moetool.forward.batches import Batch


class Hidden:
    """float32 [tokens incl. padding, hidden] of all batches, one after another. `folder` None:
    memory only, nothing to resume from.
    """

    def __init__(
        self, batches: Sequence[Batch], width: int, *, folder: Path | None, spill: bool
    ) -> None:
        sizes = [b.ids.size for b in batches]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.shape = (int(self.starts[-1]), width)
        self.folder, self.spill = folder, spill and folder is not None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.layer = 0
        self._now: np.ndarray | None = None  # in memory
        self._read = self._write = -1  # descriptors of the spilled input and output

    def resume(self) -> int:
        """Take up the input of the latest layer that an earlier run left; returns that layer (0:
        nothing there).
        """
        found = sorted(self.folder.glob("hidden-*.bin")) if self.folder else []
        whole = [f for f in found if f.stat().st_size == 4 * self.shape[0] * self.shape[1]]
        for stale in [
            *found,
            *(self.folder.glob("hidden-*" + atomic.SUFFIX) if self.folder else []),
        ]:
            if not whole or stale != whole[-1]:
                stale.unlink()
        if not whole:
            return 0
        self.layer = int(whole[-1].stem.partition("-")[2])
        if self.spill:
            self._read = os.open(whole[-1], os.O_RDONLY)
        else:
            self._now = np.fromfile(whole[-1], np.float32).reshape(self.shape)
        return self.layer

    def begin(self) -> None:
        """Room for the next layer's input (in memory: the same room)."""
        if self.spill:
            assert self.folder is not None
            self._close_write()
            self._write = os.open(
                atomic.beside(self.folder / f"hidden-{self.layer + 1:05d}.bin"),
                os.O_RDWR | os.O_CREAT | os.O_TRUNC,
                0o666,
            )
            os.ftruncate(self._write, 4 * self.shape[0] * self.shape[1])
        elif self._now is None:
            self._now = np.empty(self.shape, np.float32)

    def first(self) -> None:
        """Room for the first layer's input."""
        self.layer = -1
        self.begin()

    def read(self, number: int) -> np.ndarray:
        """A batch's rows [sequences * length, hidden]."""
        start, stop = (int(n) for n in self.starts[number : number + 2])
        if self._now is not None:
            return self._now[start:stop]
        wide = 4 * self.shape[1]
        return np.frombuffer(
            os.pread(self._read, (stop - start) * wide, start * wide), np.float32
        ).reshape(-1, self.shape[1])

    def write(self, number: int, rows: np.ndarray) -> None:
        """A batch's rows for the next layer."""
        start, stop = (int(n) for n in self.starts[number : number + 2])
        if self.spill:
            os.pwrite(
                self._write,
                np.ascontiguousarray(rows, np.float32).data.cast("B"),
                4 * start * self.shape[1],
            )
        elif self._now is not None:
            self._now[start:stop] = rows

    def end(self, *, keep: bool) -> None:
        """The layer is through. `keep`: leave its output on disk so that a later run can go on
        from here.
        """
        before, self.layer = self.layer, self.layer + 1
        if self.folder is None:
            return
        name = self.folder / f"hidden-{self.layer:05d}.bin"
        if self.spill:
            atomic.publish(atomic.beside(name))
            if self._read >= 0:
                os.close(self._read)
            self._read, self._write = self._write, -1
        elif keep and self._now is not None:
            with atomic.writing(name) as temporary:
                self._now.tofile(temporary)
        if self.spill or keep:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / f"hidden-{before:05d}.bin")

    def _close_write(self) -> None:
        if self._write >= 0:
            os.close(self._write)
            self._write = -1

    def close(self) -> None:
        """Give descriptors back."""
        self._close_write()
        if self._read >= 0:
            os.close(self._read)
            self._read = -1

    def __del__(self) -> None:
        self.close()

    def clear(self) -> None:
        """Remove what was left for resuming."""
        self._now = None
        self.close()
        for left in [*self.folder.glob("hidden-*")] if self.folder else []:
            left.unlink()
