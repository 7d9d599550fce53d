"""Hidden states between two layers: in memory while they fit, beyond that in a mapped file; kept on disk after each layer for resuming."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetool.forward.batches import Batch


class Hidden:
    """float32 [tokens incl. padding, hidden] of all batches, one after another. `folder` None: memory only, nothing to resume from."""

    def __init__(self, batches: Sequence[Batch], width: int, *, folder: Path | None, spill: bool) -> None:
        sizes = [b.ids.size for b in batches]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.shape = (int(self.starts[-1]), width)
        self.folder, self.spill = folder, spill and folder is not None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.layer = 0
        self._now: Any = None
        self._next: Any = None

    def resume(self) -> int:
        """Take up the input of the latest layer that an earlier run left; returns that layer (0: nothing there)."""
        found = sorted(self.folder.glob("hidden-*.bin")) if self.folder else []
        whole = [f for f in found if f.stat().st_size == 4 * self.shape[0] * self.shape[1]]
        for stale in [*found, *(self.folder.glob("hidden-*.tmp") if self.folder else [])]:
            if not whole or stale != whole[-1]:
                stale.unlink()
        if not whole:
            return 0
        self.layer = int(whole[-1].stem.partition("-")[2])
        self._now = np.memmap(whole[-1], np.float32, "r", shape=self.shape) if self.spill else np.fromfile(whole[-1], np.float32).reshape(self.shape)
        return self.layer

    def begin(self) -> None:
        """Room for the next layer's input (in memory: the same room)."""
        if self.spill:
            assert self.folder is not None
            self._next = np.memmap(self.folder / f"hidden-{self.layer + 1:05d}.tmp", np.float32, "w+", shape=self.shape)
        elif self._now is None:
            self._now = np.empty(self.shape, np.float32)

    def first(self) -> None:
        """Room for the first layer's input."""
        self.layer = -1
        self.begin()

    def read(self, number: int) -> np.ndarray:
        """A batch's rows [sequences * length, hidden]."""
        return np.asarray(self._now[self.starts[number] : self.starts[number + 1]])

    def write(self, number: int, rows: np.ndarray) -> None:
        """A batch's rows for the next layer."""
        there = self._next if self.spill else self._now
        there[self.starts[number] : self.starts[number + 1]] = rows

    def end(self, *, keep: bool) -> None:
        """The layer is through. `keep`: leave its output on disk so that a later run can go on from here."""
        before, self.layer = self.layer, self.layer + 1
        if self.folder is None:
            return
        name = self.folder / f"hidden-{self.layer:05d}.bin"
        if self.spill:
            self._next.flush()
            os.replace(self.folder / f"hidden-{self.layer:05d}.tmp", name)
            self._now, self._next = np.memmap(name, np.float32, "r", shape=self.shape), None
        elif keep:
            temporary = name.with_suffix(".tmp")
            self._now.tofile(temporary)
            os.replace(temporary, name)
        if self.spill or keep:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / f"hidden-{before:05d}.bin")

    def clear(self) -> None:
        """Remove what was left for resuming."""
        self._now = self._next = None
        for left in [*self.folder.glob("hidden-*")] if self.folder else []:
            left.unlink()
