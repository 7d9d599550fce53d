"""The Typer application and the session: what every command shares. Knows no command."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import typer
from typer.core import TyperGroup

from moetool.cli.sink import Sink
from moetool.cli.texts import everywhere, write_commands, write_panels

if TYPE_CHECKING:
    from typing import Any

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 10_000}


class Session:
    """What one invocation shares: the sink, and whether somebody asked to stop."""

    def __init__(self) -> None:
        self.begin("", "human")

    def begin(self, command: str, mode: str) -> None:
        """A new invocation; `command` as it was typed."""
        self.command = command
        self.sink = Sink(mode)
        self.stop = threading.Event()
        self.working = False  # what runs can be stopped and taken up again
        self.finished = False  # the output is in its place


session = Session()


def settled(option: Any) -> Any:
    """The help option with a default: Typer imports pydantic (0.1 s) to read what has none."""
    if option is not None:
        option.default = False
    return option


class CommandGroup(TyperGroup):
    """A group whose help lists its commands by what they are for."""

    def get_help_option(self, ctx: Any) -> Any:
        return settled(super().get_help_option(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_commands(self, ctx, formatter)
        write_panels(formatter, everywhere(self.get_params(ctx)))


def group(help_: str, **settings: Any) -> typer.Typer:
    """A Typer application whose help lists its commands by what they are for."""
    return typer.Typer(
        cls=CommandGroup,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
        help=help_,
        **{"add_completion": False, **settings},
    )


def bare(ctx: typer.Context) -> None:
    """A group without a command answers with its help."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
