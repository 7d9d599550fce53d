"""From fields to a command: the signature that Typer reads, made of a verb's `Field`s."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

import typer
from typer.core import TyperCommand

from moetool.cli.app import SETTINGS, settled
from moetool.cli.texts import everywhere, write_lines, write_panels
from moetool.data import JsonObject
from moetool.methods.field import Field, Value
from moetool.methods.options import PANELS
from moetool.units import show_bytes

if TYPE_CHECKING:
    from typing import Any

_INLINE = 28  # characters of choices that stand beside an option; more stand in its help
_OLD = "old_"  # parameter of an option's older name


@dataclass(frozen=True)
class Argument:
    """What stands on the line without a name."""

    name: str
    help: str
    metavar: str
    needed: bool = True  # "" where it is not, and left out


@dataclass(frozen=True)
class Given:
    """What a user said: arguments by name, and the options that differ from their defaults."""

    arguments: dict[str, str]
    values: dict[str, Value]


@dataclass(frozen=True)
class Command:
    """A command as data: its name, help, examples, and what runs it (returns the exit code)."""

    name: str
    help: str
    run: Callable[[Given], int]
    arguments: tuple[Argument, ...] = ()
    fields: tuple[Field, ...] = ()
    examples: tuple[str, ...] = ()
    panel: str = ""


class Shown(TyperCommand):
    """A command whose help shows options by panel, and examples one a line."""

    def get_help_option(self, ctx: Any) -> Any:
        return settled(super().get_help_option(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_panels(formatter, everywhere(self.get_params(ctx)))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            write_lines(formatter, self.epilog)


def register(app: typer.Typer, command: Command) -> None:
    """Make the command known to the application."""
    examples = "\n".join(["Examples:", *(f"  {e}" for e in command.examples)])
    app.command(
        command.name,
        cls=Shown,
        context_settings=SETTINGS,
        help=command.help,
        epilog=examples if command.examples else None,
        rich_help_panel=command.panel or None,
    )(_function(command))


def stub(app: typer.Typer, name: str, about: str, panel: str) -> None:
    """A command that is only listed: its options are not read before somebody asks for them."""
    register(app, Command(name, about, lambda given: 0, panel=panel))


def _function(command: Command) -> Callable[..., int]:
    """A function with the signature of the command, as Typer wants it."""

    def call(**given: Any) -> int:
        return command.run(_given(command, given))

    ordered = sorted(command.fields, key=lambda f: PANELS.index(f.panel))
    made = [*map(_argument, command.arguments), *map(_option, ordered)]
    made += [_old_option(f) for f in ordered if f.was]
    call.__name__ = command.name.replace("-", "_")
    call.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in made}
    return call


def _given(command: Command, given: JsonObject) -> Given:
    values: dict[str, Value] = {}
    for field in command.fields:
        old, value = given.get(_OLD + field.was), given[field.name]
        if old is not None:
            values[field.was] = old
        if field.type is tuple:
            value = _several(field, value)
        if value != field.default:
            values[field.name] = value
    return Given({a.name: given[a.name] for a in command.arguments}, values)


def _several(field: Field, texts: Sequence[str]) -> Value:
    """Each text of a repeated option, cut where the field cuts it."""
    found: list[str] = []
    for text in texts:
        found += cast("tuple[str, ...]", field.read(text))
    return tuple(found)


def _argument(argument: Argument) -> inspect.Parameter:
    told = typer.Argument(metavar=argument.metavar, help=argument.help, show_default=False)
    default = inspect.Parameter.empty if argument.needed else ""
    return _parameter(argument.name, Annotated[str, told], default)


def _option(field: Field) -> inspect.Parameter:
    told = typer.Option(
        *_spellings(field),
        help=helped(field),
        metavar=metavar(field),
        rich_help_panel=field.panel,
        show_default=False,
        **_reader(field),
    )
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return _parameter(field.name, Annotated[_annotation(field), told], default)


def _old_option(field: Field) -> inspect.Parameter:
    told = typer.Option(f"--{field.was.replace('_', '-')}", hidden=True, **_reader(field))
    return _parameter(_OLD + field.was, Annotated[_annotation(field) | None, told], None)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _spellings(field: Field) -> Sequence[str]:
    both = field.type is bool and field.default is not False
    return [f"--{field.spelled}/--no-{field.spelled}" if both else f"--{field.spelled}"]


def _annotation(field: Field) -> Any:
    if field.type is tuple:
        return list[str]
    plain = str if _reader(field) else field.type
    return plain | None if field.default is None else plain


def _reader(field: Field) -> JsonObject:
    """Sizes, shares, choices and numbers that must be finite are read by the field itself: the same
    words and the same errors as in recipes and in Python.
    """
    if field.type is not float and not (field.unit or field.choices):
        return {}
    if field.type is tuple:
        return {}
    reader: JsonObject = {"parser": field.read}
    if field.choices:
        reader["autocompletion"] = _completion(field.choices)
    return reader


def _completion(choices: Sequence[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [c for c in choices if c.startswith(incomplete)]

    return complete


def metavar(field: Field) -> str:
    """What stands behind the name: SIZE, or the choices where they are few."""
    beside = "|".join(field.choices)
    if field.choices and len(beside) <= _INLINE:
        return beside
    return field.metavar or {int: "N", float: "X", bool: ""}.get(field.type, field.name.upper())


def helped(field: Field) -> str:
    """What the option means, its choices where they are many, and its default."""
    unsaid = [c for c in field.choices if c not in field.help]
    listed = bool(unsaid) and metavar(field) != "|".join(field.choices)
    text = f"{field.help}: {', '.join(field.choices)}" if listed else field.help
    return f"{text} [default: {shown_default(field)}]" if shown_default(field) else text


def shown_default(field: Field) -> str:
    """What a field is when nobody says it, as people write it; empty for nothing and for flags."""
    if field.unit == "bytes" and isinstance(field.default, int):
        return show_bytes(field.default).replace(" ", "")
    if isinstance(field.default, bool) or field.default in (None, "", ()):
        return ""
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
