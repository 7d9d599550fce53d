"""How help is laid out: options in panels, one option a row, at the terminal's width."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Rows = list[tuple[str, str]]
Panels = dict[str, Rows]
EVERYWHERE = "Everywhere"
_SHARED = [
    ("--json", "one JSON object on stdout"),
    ("-q, --quiet", "say nothing but errors"),
]


def row(param: Any) -> tuple[str, str]:
    """`--ratio SHARE` and what it means."""
    names = ", ".join(sorted(param.opts, key=len))
    if param.secondary_opts:
        names += " / " + ", ".join(param.secondary_opts)
    if not param.is_flag and param.metavar:
        names += f" {param.metavar}"
    return names, param.help or ""


def panels(params: Iterable[Any]) -> Panels:
    """Options by panel, in the order in which they were declared."""
    found: Panels = {}
    for param in params:
        if param.param_type_name == "argument":
            found.setdefault("Arguments", []).append((param.metavar, param.help or ""))
        elif not param.hidden:
            panel = getattr(param, "rich_help_panel", None) or EVERYWHERE
            found.setdefault(panel, []).append(row(param))
    return found


def everywhere(params: Iterable[Any]) -> Panels:
    """The same, and what every command understands."""
    found = panels(params)
    last = found.pop(EVERYWHERE, [])
    return {**found, EVERYWHERE: [*_SHARED, *last]}


def write_panels(formatter: Any, found: Panels) -> None:
    """Each panel under its name."""
    for name, rows in found.items():
        with formatter.section(name):
            formatter.write_dl(rows)


def write_commands(group: Any, ctx: Any, formatter: Any) -> None:
    """The commands of a group by what they are for."""
    found: Panels = {}
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        panel = getattr(command, "rich_help_panel", None) or "Commands"
        found.setdefault(panel, []).append((name, (command.help or "").partition("\n")[0]))
    write_panels(formatter, found)


def write_lines(formatter: Any, text: str) -> None:
    """Lines as they are."""
    formatter.write_paragraph()
    for line in text.splitlines():
        formatter.write(f"{line}\n")
