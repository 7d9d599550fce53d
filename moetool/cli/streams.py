"""Standard output and standard error as they are: in any encoding, full, closed, or with nobody at
the other end. None of that may stop a command in its work, or end in a traceback.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from moetool.errors import MoetoolError


class Stream(io.TextIOBase):
    """A stream that takes every text. Once writing has failed (`problem`) the rest is dropped."""

    def __init__(self, real: TextIO | None) -> None:
        self.real: TextIO = io.StringIO() if real is None else real
        self.problem: Exception | None = None
        if isinstance(real, io.TextIOWrapper):
            real.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """As a file's."""
        self._try(lambda: self.real.write(text))
        return len(text)

    def flush(self) -> None:
        """As a file's."""
        self._try(self.real.flush)

    def _try(self, act: object) -> None:
        if self.problem is not None:
            return
        try:
            act()  # type: ignore[operator]
        except (OSError, ValueError) as problem:
            self.problem = problem
            self._drop()

    def _drop(self) -> None:
        """What is in the buffer must not be tried again at the interpreter's end."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.real.fileno())
            os.close(nowhere)

    def isatty(self) -> bool:
        """Whether somebody sits there."""
        return self.real.isatty()

    def fileno(self) -> int:
        """The real one's."""
        return self.real.fileno()

    def writable(self) -> bool:
        """Always."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The real one's."""
        return getattr(self.real, "encoding", None) or "utf-8"

    @property
    def takes_all(self) -> bool:
        """Whether characters beyond ASCII arrive as they are."""
        return self.encoding.lower().replace("-", "") == "utf8"


@contextmanager
def guarded() -> Iterator[Stream]:
    """Both streams guarded, for one command; yields standard output."""
    for number in range(3):  # a file that is opened later must not become a standard stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BytesIO())  # closed by the caller: there is no text there
    before = sys.stdout, sys.stderr
    out = Stream(sys.stdout)
    sys.stdout, sys.stderr = out, Stream(sys.stderr)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before


def finished(out: Stream, code: int) -> int:
    """Write out what is left of the answer. The exit code stays where nobody listens any more (as
    `| head -1`); an answer that got lost (a full disk) is a failure, although the work is done.
    """
    out.flush()
    if out.problem is not None and not isinstance(out.problem, BrokenPipeError):
        lost = MoetoolError(
            "the answer could not be written: "
            f"{getattr(out.problem, 'strerror', None) or out.problem}",
            file="standard output",
            hint="what the command made is there; free some space, or send its answer elsewhere",
        )
        print(f"error: {lost}", file=sys.stderr)
        code = code or lost.exit_code
    sys.stderr.flush()
    return code
