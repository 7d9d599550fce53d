"""What can go wrong, once, with the exit code a shell sees.

    MoetoolError                 1  the input or the result is wrong
    |-- UsageError               2  the command itself is wrong
    |-- Unfit                  1  what was asked for cannot hold these weights; nothing is left
    |-- Stopped                  3  stopped by a signal; the same command goes on where it stopped
    `-- VerificationFailed       4  a checkpoint is not what it should be

A message says what happened: file, tensor, expected, found; `hint` says what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from moetool.data import JsonObject


class MoetoolError(Exception):
    """The input or the result is wrong; `file`, `tensor`, `expected`, `found` and `hint` stand in
    the message.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", **where: Any) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint
        self.where = {k: str(v) for k, v in where.items() if v is not None}

    def __str__(self) -> str:
        """One paragraph: message, then the facts, then the next step."""
        lines = [self.message]
        lines += [f"  {key}: {value}" for key, value in self.where.items()]
        if self.hint:
            lines.append(f"  next: {self.hint}")
        return "\n".join(lines)

    def as_dict(self) -> JsonObject:
        """The same facts for `--json`."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            **self.where,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }


class UsageError(MoetoolError):
    """The command or recipe itself is wrong."""

    exit_code = 2


class Unfit(MoetoolError):
    """What was asked for cannot hold these weights, as their values show during the work; what was
    begun is removed, since the same command would end here again.
    """


class Stopped(MoetoolError):
    """Stopped by Ctrl-C or SIGTERM; finished shards are kept."""

    exit_code = 3


class VerificationFailed(MoetoolError):
    """A checkpoint is not what its plan, or its source, says."""

    exit_code = 4


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean X?` in any case, or all the known words when none is near."""
    known = sorted(known)
    small = {k.lower(): k for k in known}
    near = [small[k] for k in difflib.get_close_matches(word.lower(), small, n=2, cutoff=0.6)]
    near = [w for w in near if w.lower() == word.lower()] or near
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
