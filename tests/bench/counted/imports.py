"""Who imports whom, read with `ast`: circles, and imports of a higher floor. `house.py` counts with it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# From the top down; names on one line may not import one another. A module belongs to the longest
# prefix that names it; what no line names (moetool itself, __main__, archs) is left out.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("pipeline", "road", "recipe", "measure"),
    ("report", "evaluate"),
    ("methods",),
    ("forward",),
    ("surgery",),
    ("kernels", "demo"),
    ("units",),
    ("errors",),
)


@dataclass(frozen=True)
class Import:
    """One module needs another."""

    source: str
    target: str
    typing: bool  # under `if TYPE_CHECKING`
    lazy: bool  # inside a function


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path, package: str) -> list[Import]:
    """Every import of one module of the package by another, once for each place and kind."""
    known = modules(root, package)
    found: dict[Import, None] = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text())
        for node, typing, lazy in _walk(tree, typing=False, lazy=False):
            for target in _targets(node, known):
                if target != name:
                    found[Import(name, target, typing, lazy)] = None
    return list(found)


def _walk(node: ast.AST, *, typing: bool, lazy: bool) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Import statements below a node, with where they stand."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, typing, lazy
            continue
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _walk(child, typing=typing or checking, lazy=lazy or inside)


def _targets(node: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            if inner in known:
                yield inner
            elif node.module in known:
                yield node.module


def circles(edges: Iterable[Import]) -> list[list[str]]:
    """Groups of modules that reach one another: strongly connected components of two or more
    (Tarjan 1972), each sorted, the largest first.
    """
    graph: dict[str, list[str]] = {}
    for edge in edges:
        graph.setdefault(edge.source, []).append(edge.target)
        graph.setdefault(edge.target, [])
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            cut = stack.index(node)
            group = sorted(stack[cut:])
            del stack[cut:]
            if len(group) > 1:
                found.append(group)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found, key=lambda group: (-len(group), group))


def package_circles(edges: Iterable[Import]) -> list[list[str]]:
    """The same between the floors' folders and files (moetool.report, moetool.pipeline, ...)."""

    def top(name: str) -> str:
        return ".".join(name.split(".")[:2])

    # The package itself (the Python verbs) stands above all floors and is asked by none of them.
    return circles(
        Import(top(e.source), top(e.target), e.typing, e.lazy)
        for e in edges
        if top(e.source) != top(e.target) and "." in e.source and "." in e.target
    )


def upward(edges: Iterable[Import], package: str) -> list[Import]:
    """Imports of a module on a higher floor."""
    height = {
        f"{package}.{name}": len(FLOORS) - number
        for number, names in enumerate(FLOORS)
        for name in names
    }

    def floor(name: str) -> int | None:
        return height.get(".".join(name.split(".")[:2]))

    found = []
    for edge in edges:
        below, above = floor(edge.source), floor(edge.target)
        if below is not None and above is not None and above > below:
            found.append(edge)
    return found
