"""The `moetool` command. Imports nothing heavy: `--help` must answer at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import typer

from moetool.cli import streams
from moetool.cli.app import session
from moetool.cli.commands import application
from moetool.errors import MoetoolError, Stopped, UsageError

_CLICK_INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt
_MODES = {"--json": "json", "--quiet": "quiet", "-q": "quiet"}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code and never raises."""
    with streams.guarded() as out:
        code = streams.finished(out, _run(argv))
    if argv is None and code == Stopped.exit_code:
        # CPython kills itself with SIGINT at exit if a KeyboardInterrupt once passed through C code
        # (an import of torch), although it was caught.
        os._exit(code)
    return code


def _run(argv: list[str] | None) -> int:
    typed = list(sys.argv[1:] if argv is None else argv)
    line = _parsed(typed)
    session.begin(shlex.join(["moetool", *typed]), line.mode)
    before = _catch_signals()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # __main__.py kept it out
        return _called(line.words)
    except MoetoolError as problem:
        session.sink.error(problem)
        return problem.exit_code
    except (KeyboardInterrupt, typer.Abort):
        session.sink.error(
            Stopped("stopped before anything was written", hint="run the same command again")
        )
        return Stopped.exit_code
    except typer.Exit as done:
        return done.exit_code
    except Exception as problem:  # noqa: BLE001
        return _unexpected(problem)
    finally:
        # Nothing is left to stop: a late signal must not disturb the interpreter's exit.
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if argv is None else handler)


def _called(words: list[str]) -> int:
    code = application(words)(words, prog_name="moetool", standalone_mode=False)
    if code == _CLICK_INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _unexpected(problem: Exception) -> int:
    """Typer's own usage errors, a closed pipe, and the bug that we did not foresee: a sentence
    each, no traceback.
    """
    shown = getattr(problem, "format_message", None)
    if shown is not None and hasattr(problem, "exit_code"):
        context = getattr(problem, "ctx", None)
        name = (context.command_path if context else "") or "moetool"
        session.sink.error(UsageError(shown(), hint=f"see `{name} --help`"))
        return 2
    session.sink.error(_known(problem) or _bug(problem))
    if os.environ.get("MOETOOL_DEBUG"):
        raise problem
    return 1


def _known(problem: Exception) -> MoetoolError | None:
    """What the machine refused."""
    text = str(problem)  # torch says it with a RuntimeError
    if isinstance(problem, MemoryError) or "can't allocate memory" in text:
        return MoetoolError(
            "out of memory",
            hint="say --memory, so that the work is fitted or refused beforehand; finished shards are kept",
        )
    if isinstance(problem, FileNotFoundError) and problem.filename is None:
        return MoetoolError(
            "the working directory is gone", hint="change to a folder that is there"
        )
    if isinstance(problem, OSError):
        return MoetoolError(
            f"{problem.strerror or problem}",
            file=problem.filename,
            hint="check the path, its permissions and the free space",
        )
    return None


def _bug(problem: Exception) -> MoetoolError:
    where = problem.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else "?"
    return MoetoolError(
        f"a bug in moetool: {type(problem).__name__}: {problem}",
        file=place,
        hint="please report it with the command and `moetool inspect --json` of the source",
    )


@dataclass(frozen=True)
class Typed:
    """What was typed: the words that Typer parses, and how the user wants to be told."""

    words: list[str]
    mode: str


def _parsed(typed: list[str]) -> Typed:
    """`--json` and `--quiet` may stand anywhere before `--`; json wins."""
    cut = typed.index("--") if "--" in typed else len(typed)
    modes = {_MODES[word] for word in typed[:cut] if word in _MODES}
    words = [word for word in typed[:cut] if word not in _MODES]
    return Typed(words + typed[cut:], min(modes, default="human"))


Handlers = dict[int, Callable[[int, FrameType | None], Any] | int | None]


def _catch_signals() -> Handlers:
    """The first Ctrl-C or SIGTERM lets running copies end; a second one ends at once. Returns the
    handlers of before.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if session.finished:
            return
        if session.stop.is_set() or not session.working:
            raise KeyboardInterrupt
        session.stop.set()
        session.sink.say("stopping; finished shards are kept (again to stop at once)")

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
