"""The one place where output happens: human, json or quiet; results on stdout, everything else on
stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moetool import strict_json
from moetool.data import JsonMapping
from moetool.errors import MoetoolError
from moetool.units import show_bytes, show_seconds

if TYPE_CHECKING:
    from moetool.progress import Stage

_SMALL = 50_000_000  # bytes that are moved before anybody could read a line


class Sink:
    """Knows how the user wants to be told. `mode` is human, json or quiet."""

    def __init__(self, mode: str = "human") -> None:
        self.mode = mode
        self._stage = ""
        self._begun = self._last = 0.0
        self._tty = sys.stderr is not None and sys.stderr.isatty()

    def result(self, data: JsonMapping | None, human: str | None = None) -> None:
        """The answer of a command: one JSON object, or text (nothing in quiet mode)."""
        self._end_line()
        if self.mode == "json":
            print(self._json(data))
        elif self.mode == "human" and human:
            print(human)

    def line(self, text: str) -> None:
        """A line of the answer that only people see."""
        if self.mode == "human":
            print(text)

    def say(self, text: str) -> None:
        """A remark on stderr."""
        if self.mode != "quiet":
            self._end_line()
            print(text, file=sys.stderr)

    def _json(self, data: JsonMapping | None) -> str:
        return strict_json.text(data, ascii=not getattr(sys.stdout, "takes_all", True))

    def error(self, problem: MoetoolError) -> None:
        """A failure: always said, in every mode."""
        self._end_line()
        if self.mode == "json":
            print(self._json(problem.as_dict()))
        print(f"error: {problem}", file=sys.stderr)

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[object]],
        title: str = "",
        *,
        plain: bool = False,
    ) -> None:
        """A table on stdout, by Rich on a terminal and in plain columns elsewhere. `plain`: in
        plain columns anyway, for cells that must stay whole (names of tensors).
        """
        if self.mode != "human":
            return
        if sys.stdout.isatty() and not plain:
            _rich_table(head, rows, title)
            return
        cells = [[str(c) for c in row] for row in (head, *rows)]
        widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
        if title:
            print(title)
        for row in cells:
            print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())

    def progress(self, stage: Stage, done: int, total: int) -> None:
        """A stage of the work, in its own unit: a live line with rate and time left on a terminal,
        a line every few seconds elsewhere.
        """
        if self.mode == "quiet" or (stage.unit == "bytes" and total < _SMALL):
            return
        now = time.monotonic()
        if stage.name != self._stage:
            self._end_line()
            self._stage, self._begun, self._last = stage.name, now, now
        if not self._due(stage, now, ended=done >= total):
            return
        self._last = now
        counted = _bytes if stage.unit == "bytes" else _steps
        line = f"{stage.name} {counted(stage, done, total, now - self._begun)}"
        shown, end = (f"\r\033[K{line}", "") if self._tty else (line, "\n")
        print(shown, end=end, file=sys.stderr, flush=True)

    def _due(self, stage: Stage, now: float, *, ended: bool) -> bool:
        """Whether it is time for another line."""
        if stage.unit != "bytes":
            return self._tty or now - self._last >= 10.0
        if ended:
            return self._tty or self._last != self._begun
        return now - self._last >= (0.2 if self._tty else 5.0)

    def _end_line(self) -> None:
        if self._tty and self._stage:
            print(file=sys.stderr)
        self._stage = ""


def _bytes(stage: Stage, done: int, total: int, took: float) -> str:
    """`1 GB of 4 GB (25 %), 167 MB/s, 18.0s left`."""
    rate = done / max(took, 1e-6)
    left = show_seconds((total - done) / rate) if rate else "?"
    share = f"{show_bytes(done)} of {show_bytes(total)} ({100 * done // total} %)"
    return f"{share}, {show_bytes(rate)}/s, {left} left"


def _steps(stage: Stage, done: int, total: int, took: float) -> str:
    """`layer 3 of 32, 1.2s a layer, 34.8s left`; tokens are many, and no step each."""
    each = took / done if done else 0.0
    left = f"{show_seconds(each * (total - done))} left" if done else ""
    if stage.unit == "tokens":
        return ", ".join(filter(None, [f"{done:,} of {total:,} tokens", left]))
    pace = f"{each:.1f}s a layer" if done else ""
    return ", ".join(filter(None, [f"layer {done} of {total}", pace, left]))


def _rich_table(head: Sequence[str], rows: Sequence[Sequence[object]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, title=title or None, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
