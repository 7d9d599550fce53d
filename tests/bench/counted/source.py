"""A file of the package as it is counted, and a line of the table."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "moetool"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure, what it should be, and where what it counts lies."""

    what: str
    now: float
    goal: str = ""
    met: bool = True
    places: tuple[str, ...] = ()
    percent: bool = False

    @property
    def shown(self) -> str:
        """The figure as the table has it."""
        if self.percent:
            return f"{self.now:.1%}"
        return f"{self.now:g}" if self.now == round(self.now) else f"{self.now:.2f}"


@dataclass
class Source:
    """A file of the package, read once."""

    name: str
    text: str
    tree: ast.Module
    functions: list[Function] = field(default_factory=list)
    classes: list[ast.ClassDef] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, root: Path) -> Source:
        """Parse a file, and find its functions and classes (methods and inner ones included)."""
        text = path.read_text()
        source = cls(str(path.relative_to(root)), text, ast.parse(text))
        for node in ast.walk(source.tree):
            if isinstance(node, Function):
                source.functions.append(node)
            elif isinstance(node, ast.ClassDef):
                source.classes.append(node)
        return source

    def at(self, node: ast.AST, what: str = "") -> str:
        """file:line of a node, and a word about it."""
        return f"{self.name}:{getattr(node, 'lineno', 0)} {what}".rstrip()


def at_most(what: str, places: list[str], limit: int) -> Row:
    """A figure that counts places, of which there may be so many."""
    goal = f"at most {limit}" if limit else "0"
    return Row(what, len(places), goal, len(places) <= limit, tuple(places))
