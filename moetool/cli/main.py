"""The `moetool` command. Imports nothing heavy: `--help` must answer at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import typer

from moetool.cli.sink import Sink
from moetool.errors import MoetoolError, Stopped, UsageError

app = typer.Typer(
    name="moetool",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    help="Turn dense checkpoints into mixtures of experts, and check that they still compute the same. Safetensors in, safetensors out.",
    epilog="Everywhere: --json (one JSON object on stdout), --quiet. Exit codes: 0 done, 1 input or result wrong, 2 usage, 3 stopped but resumable, 4 verification failed.",
)
archs_app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Model families: which there are, what converts to what exactly, and why not.",
)
methods_app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Methods and their options."
)
app.add_typer(archs_app, name="archs")
app.add_typer(methods_app, name="methods")


class Session:
    """What one invocation shares: the sink, and whether somebody asked to stop."""

    def __init__(self) -> None:
        self.sink = Sink()
        self.stop = threading.Event()
        self.working = False
        self.finished = False  # the output is in its place
        self.command = ""


session = Session()
_CLICK_INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code and never raises."""
    code = _run(argv)
    if argv is None and code == Stopped.exit_code:
        # CPython kills itself with SIGINT at exit if a KeyboardInterrupt once passed through C code
        # (an import of torch), although it was caught.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(argv: list[str] | None) -> int:
    global session
    args = list(sys.argv[1:] if argv is None else argv)
    session.__init__()  # type: ignore[misc]
    session.command = _shell_line(args)
    args, mode = _modes(args)
    session.sink = Sink(mode)
    before = _catch_signals()
    try:
        _commands()
        code = app(args, standalone_mode=False)
        if code == _CLICK_INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
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
        for (
            number,
            handler,
        ) in (
            before.items()
        ):  # nothing is left to stop: a late signal must not disturb the interpreter's exit
            signal.signal(number, signal.SIG_IGN if argv is None else handler)


def _unexpected(problem: Exception) -> int:
    """Click's own usage errors, a closed pipe, and the bug that we did not foresee: a sentence
    each, no traceback.
    """
    import click

    shown = getattr(problem, "format_message", None)
    if shown is not None and (
        isinstance(problem, click.ClickException) or type(problem).__module__.startswith("typer")
    ):
        name = (
            problem.ctx.command_path if getattr(problem, "ctx", None) else "moetool"
        ) or "moetool"  # type: ignore[attr-defined]
        session.sink.error(UsageError(shown(), hint=f"see `{name} --help`"))
        return 2
    if isinstance(problem, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(problem, MemoryError) or "can't allocate memory" in str(
        problem
    ):  # torch says it with a RuntimeError
        session.sink.error(
            MoetoolError(
                "out of memory",
                hint="say --memory, so that the work is fitted or refused beforehand; finished shards are kept",
            )
        )
        return 1
    if isinstance(problem, OSError):
        session.sink.error(
            MoetoolError(
                f"{problem.strerror or problem}",
                file=problem.filename,
                hint="check the path, its permissions and the free space",
            )
        )
        return 1
    where = problem.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else "?"
    session.sink.error(
        MoetoolError(
            f"a bug in moetool: {type(problem).__name__}: {problem}",
            file=place,
            hint="please report it with the command and `moetool inspect --json` of the source",
        )
    )
    if os.environ.get("MOETOOL_DEBUG"):
        raise problem
    return 1


def _modes(args: list[str]) -> tuple[list[str], str]:
    """`--json` and `--quiet` may stand anywhere."""
    cut = args.index("--") if "--" in args else len(args)
    head = [a for a in args[:cut] if a not in ("--json", "--quiet", "-q")]
    mode = (
        "json"
        if "--json" in args[:cut]
        else "quiet"
        if {"--quiet", "-q"} & set(args[:cut])
        else "human"
    )
    return head + args[cut:], mode


def _shell_line(args: list[str]) -> str:
    import shlex

    return shlex.join(["moetool", *args])


def _catch_signals() -> dict[int, Any]:
    """The first Ctrl-C or SIGTERM lets running copies end; a second one ends at once. Returns the
    handlers of before.
    """

    def handle(number: int, frame: Any) -> None:
        if session.finished:
            return
        if session.stop.is_set() or not session.working:
            raise KeyboardInterrupt
        session.stop.set()
        session.sink.say("stopping; finished shards are kept (again to stop at once)")

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}


def _commands() -> None:
    """Register the commands (each module adds its own to `app`)."""
    from moetool.cli import compress, demo, look, measure, recipe, upcycle, verify  # noqa: F401
