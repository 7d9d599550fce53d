"""Options that are declared twice, and names of ways that other files spell."""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path

from tests.bench.counted.source import PACKAGE, Row, Source, at_most


def _call(node: ast.AST | None) -> str:
    """The last word of what is called: `typer.Option(...)` -> Option."""
    if not isinstance(node, ast.Call):
        return ""
    return ast.unparse(node.func).rpartition(".")[2]


def _help(call: ast.AST | None) -> str:
    """The help text of option(default, text), Opt(help=...), typer.Option(help=...)."""
    if not isinstance(call, ast.Call):
        return ""
    texts = [k.value for k in call.keywords if k.arg == "help"] or call.args[1:2]
    return ast.unparse(texts[0]) if texts else ""


def _resolved(help_text: str, sources: list[Source]) -> str:
    """A help text with the constants of methods put in, where it is an f-string of one name."""
    if not help_text.startswith("f"):
        return help_text.strip("'\"")
    for source in sources:
        for node in source.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                name = f"{{{Path(source.name).stem}.{ast.unparse(node.targets[0])}}}"
                help_text = help_text.replace(name, str(node.value.value))
    return help_text[1:].strip("'\"")


def method_fields(sources: list[Source]) -> list[tuple[str, str, str]]:
    """(name, help, place) of every option that a dataclass under methods/ declares with a help
    text: the value is a call that carries one.
    """
    found = []
    for source in sources:
        if not source.name.startswith(f"{PACKAGE}/methods/"):
            continue
        for cls in source.classes:
            for node in cls.body:
                if isinstance(node, ast.AnnAssign) and _call(node.value) and _help(node.value):
                    name = ast.unparse(node.target)
                    text = _resolved(_help(node.value), sources)
                    found.append((name, text, source.at(node, name)))
    return found


def terminal_fields(sources: list[Source]) -> dict[str, list[str]]:
    """name -> help texts of every parameter that cli/ declares with typer.Option or Argument,
    directly or by an alias such as `Seed = Annotated[int, typer.Option(...)]`.
    """
    aliases: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    cli = [s for s in sources if s.name.startswith(f"{PACKAGE}/cli/")]
    for source in cli:
        for node in source.tree.body:
            if isinstance(node, ast.Assign) and (call := _typer(node.value)) is not None:
                aliases[ast.unparse(node.targets[0])] = _help(call)
    for source in cli:
        for function in source.functions:
            for arg in (*function.args.args, *function.args.kwonlyargs):
                call = _typer(arg.annotation)
                text = aliases.get(ast.unparse(arg.annotation)) if arg.annotation else None
                text = _help(call) if call is not None else text
                if text is not None:
                    found.setdefault(arg.arg, []).append(text.strip("'\""))
    return found


def _typer(node: ast.AST | None) -> ast.Call | None:
    """The typer.Option(...) or typer.Argument(...) inside an annotation."""
    for inner in ast.walk(node) if node is not None else ():
        if _call(inner) in ("Option", "Argument") and isinstance(inner, ast.Call):
            return inner
    return None


def count_options(sources: list[Source]) -> list[Row]:
    """Fields that methods/ and cli/ both declare, and those whose help texts differ."""
    terminal = terminal_fields(sources)
    twice = [(n, text, at) for n, text, at in method_fields(sources) if n in terminal]
    differ = [
        f"{at}: {text!r} / {terminal[name][0]!r}"
        for name, text, at in twice
        if text not in terminal[name]
    ]
    return [
        at_most("option fields declared twice (methods and cli)", [at for *_, at in twice], 0),
        at_most("... help texts that differ", differ, 0),
    ]


def _documented(tree: ast.Module) -> set[ast.AST]:
    """The string nodes that are docstrings."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            found.add(body[0].value)
    return found


def count_mentions(sources: list[Source]) -> list[Row]:
    """What one more way of pruning or merging has to edit besides its own file: files whose code
    spells a registered way's name (in a string; docstrings aside), for the median way.
    """
    rows = []
    for verb in ("prune", "merge"):
        ways = {
            value.value: source.name
            for source in sources
            if source.name.startswith(f"{PACKAGE}/methods/{verb}/")
            for value in map(_name_of, source.classes)
            if value is not None
        }
        named = {
            way: [s.name for s in sources if s.name != own and _spells(s, way)]
            for way, own in ways.items()
        }
        middle = statistics.median([len(files) for files in named.values()] or [0])
        places = tuple(f"{way}: {', '.join(files)}" for way, files in named.items() if files)
        rows.append(Row(f"files that spell a {verb} way's name", middle, "0", middle == 0, places))
    return rows


def _name_of(cls: ast.ClassDef) -> ast.Constant | None:
    """The text of `name = "..."` in a class's body."""
    for node in cls.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            words = re.findall(r"\w+", ast.unparse(node))
            if words[0] == "name" and isinstance(node.value.value, str) and node.value.value:
                return node.value
    return None


def _spells(source: Source, word: str) -> bool:
    """Whether a string literal of the file has the word in it."""
    documented = _documented(source.tree)
    return any(
        word in re.findall(r"[\w-]+", node.value)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documented
    )
