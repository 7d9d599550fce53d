"""Which commands there are. A verb that writes shows up by itself (methods.METHODS); a reading one
is a file here and a line below.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

from moetool import __version__, methods
from moetool.cli import archs, demo, eval, guide, inspect, profile, run, schema, verify, write
from moetool.cli import methods as methods_shown
from moetool.cli.app import bare, group, session
from moetool.cli.options import Command, register, stub

HELP = (
    "Turn dense checkpoints into mixtures of experts, make those smaller, and check what it did "
    "to them. Safetensors in, safetensors out.\n\n"
    "Exit codes: 0 done, 1 input or result wrong, 2 usage, 3 stopped but resumable, "
    "4 verification failed."
)
READING = (run, profile, eval, verify, demo, inspect, schema, guide)
_COMPLETE = "_MOETOOL_COMPLETE"  # set where a shell asks for completions
GROUPS = {"archs": archs, "methods": methods_shown}


def application(words: Sequence[str]) -> typer.Typer:
    """The whole command line. The options of a writing verb are read only where `words`, what was
    typed, names it: reading all of them would make `--help` slow.
    """
    completing = _COMPLETE in os.environ
    typed = _completed() if completing else words
    # Typer imports pydantic for every option that it reads: these stand where they can be given.
    root = not words or words[0].startswith("-")
    app = group(HELP, add_completion=root)
    app.callback(invoke_without_command=True)(_root if root else bare)
    for name, entry in methods.METHODS.items():
        if name in typed:
            register(app, write.command(name))
        else:
            stub(app, name, entry.about, write.PANEL)
    for module in READING:
        register(app, module.COMMAND)
    for name, shown in GROUPS.items():
        app.add_typer(_group(shown.HELP, shown.COMMANDS), name=name, rich_help_panel="Look")
    return app


def _completed() -> list[str]:
    """The words so far, as the shells pass them."""
    return (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "").split()


def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        session.sink.result({"version": __version__}, f"moetool {__version__}")
        raise typer.Exit
    bare(ctx)


def _group(help_: str, commands: Iterable[Command]) -> typer.Typer:
    app = group(help_)
    app.callback(invoke_without_command=True)(bare)
    for command in commands:
        register(app, command)
    return app
