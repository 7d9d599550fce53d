"""How the code is built, in figures: `python tests/bench/house.py [--root DIR] [--check] [--list]`.

Reads moetool/ with `ast` (tests are left out but where the ratio of tests to code is meant) and prints
one table, `now | goal`. `--check` ends with 1 when a goal is missed, `--list [WORD]` names the places
behind each figure, `--root` counts another checkout. Imports nothing of moetool: it counts any version.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.counted import imports, options, style
from tests.bench.counted.source import PACKAGE, Row, Source, at_most


def count_imports(root: Path) -> list[Row]:
    """Circles and upward imports, with what is only for types, and with what functions import."""
    edges = imports.imports(root, PACKAGE)
    typed = [e for e in edges if not e.lazy]
    plain = [e for e in typed if not e.typing]
    rows = []
    for what, chosen in (
        ("import circles at run time", plain),
        ("... TYPE_CHECKING included", typed),
        ("... imports inside functions included", edges),
    ):
        found = [f"{len(c)}: {', '.join(c)}" for c in imports.circles(chosen)]
        rows.append(at_most(what, found, 0))
    folders = [", ".join(c) for c in imports.package_circles(edges)]
    rows.append(at_most("... of folders", folders, 0))
    upward = [f"{e.source} -> {e.target}" for e in imports.upward(edges, PACKAGE)]
    rows.append(at_most("imports of a higher floor (by module)", upward, 0))
    return rows


def count_tests(root: Path) -> list[Row]:
    """Lines of tests/ by lines of moetool/."""

    def lines(folder: str) -> int:
        return sum(len(p.read_text().splitlines()) for p in (root / folder).rglob("*.py"))

    ratio = lines("tests") / lines(PACKAGE)
    return [Row("lines of tests by lines of code", round(ratio, 2), "at least 0.6", ratio >= 0.6)]


COUNTS: tuple[Callable[[list[Source]], list[Row]], ...] = (
    options.count_options,
    style.count_functions,
    style.count_lines,
    style.count_any,
    style.count_expressions,
    style.count_names,
    options.count_mentions,
)


def count(root: Path) -> list[Row]:
    """All rows for a checkout."""
    sources = [Source.read(p, root) for p in sorted((root / PACKAGE).rglob("*.py"))]
    rows = count_imports(root)
    for counting in COUNTS:
        rows += counting(sources)
    return rows + count_tests(root)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when --check finds a goal missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--check", action="store_true", help="end with 1 when a goal is missed")
    parser.add_argument("--list", metavar="WORD", nargs="?", const="", help="name the places")
    asked = parser.parse_args(argv)
    rows = count(asked.root.resolve())
    print("| counted | now | goal | |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.what} | {row.shown} | {row.goal} | {'' if row.met else 'missed'} |")
    if asked.list is not None:
        for row in rows:
            if row.places and asked.list in row.what:
                print(f"\n{row.what}:", *row.places, sep="\n  ")
    return int(asked.check and not all(row.met for row in rows))


if __name__ == "__main__":
    sys.exit(main())
