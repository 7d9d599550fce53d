"""The one place where output happens: human, json or quiet; results on stdout, everything else on
stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from moetool import strict_json
from moetool.units import show_bytes, show_seconds


class Sink:
    """Knows how the user wants to be told. `mode` is human, json or quiet."""

    def __init__(self, mode: str = "human") -> None:
        self.mode = mode
        self._stage = ""
        self._begun = self._last = 0.0
        self._tty = sys.stderr.isatty()

    def result(self, data: Any, human: str | None = None) -> None:
        """The answer of a command: one JSON object, or text (nothing in quiet mode)."""
        self._end_line()
        if self.mode == "json":
            print(strict_json.text(data))
        elif self.mode == "human" and human:
            print(human)

    def say(self, text: str) -> None:
        """A remark on stderr."""
        if self.mode != "quiet":
            self._end_line()
            print(text, file=sys.stderr)

    def error(self, problem: Any) -> None:
        """A failure: always said, in every mode."""
        self._end_line()
        if self.mode == "json":
            print(strict_json.text(problem.as_dict()))
        print(f"error: {problem}", file=sys.stderr)

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[Any]],
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
            from rich.console import Console
            from rich.table import Table

            table = Table(*head, title=title or None, title_justify="left")
            for row in rows:
                table.add_row(*map(str, row))
            Console().print(table)
            return
        cells = [[str(c) for c in row] for row in (head, *rows)]
        widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
        if title:
            print(title)
        for row in cells:
            print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())

    def progress(self, stage: str, done: int, total: int) -> None:
        """Bytes of a stage: a live line with rate and time left on a terminal, a line every few
        seconds elsewhere.
        """
        if self.mode == "quiet" or total < 50_000_000:
            return
        now = time.monotonic()
        if stage != self._stage:
            self._end_line()
            self._stage, self._begun, self._last = stage, now, now
        if now - self._last < (0.2 if self._tty else 5.0) and done < total:
            return
        if done >= total and not self._tty and self._last == self._begun:
            return
        self._last = now
        rate = done / max(now - self._begun, 1e-6)
        left = show_seconds((total - done) / rate) if rate else "?"
        line = f"{stage} {show_bytes(done)} of {show_bytes(total)} ({100 * done // total} %), {show_bytes(rate)}/s, {left} left"
        print(
            f"\r\033[K{line}" if self._tty else line,
            end="" if self._tty else "\n",
            file=sys.stderr,
            flush=True,
        )

    def either(self, stage: str, done: int, total: int) -> None:
        """Bytes while writing, steps while text goes through a model."""
        (
            self.steps
            if stage.startswith(("eval", "profile", "propagate")) and "head" not in stage
            else self.progress
        )(stage, done, total)

    def steps(self, stage: str, done: int, total: int) -> None:
        """Layers of a walk: a live line with rate and time left on a terminal, a line every few
        seconds elsewhere.
        """
        if self.mode == "quiet":
            return
        now = time.monotonic()
        if stage != self._stage:
            self._end_line()
            self._stage, self._begun, self._last = stage, now, now
        if not self._tty and now - self._last < 10.0:
            return
        self._last = now
        each = (now - self._begun) / done if done else 0.0
        left = f", {each:.1f}s a layer, {show_seconds(each * (total - done))} left" if done else ""
        line = f"{stage} layer {done} of {total}{left}"
        print(
            f"\r\033[K{line}" if self._tty else line,
            end="" if self._tty else "\n",
            file=sys.stderr,
            flush=True,
        )

    def _end_line(self) -> None:
        if self._tty and self._stage:
            print(file=sys.stderr)
        self._stage = ""
