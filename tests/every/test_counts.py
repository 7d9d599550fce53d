"""tests/bench/house.py counts what it says: a small package with one of each fault, and one without."""

from __future__ import annotations

from pathlib import Path

from bench import house

FAULTY = {
    "moetool/__init__.py": "",
    "moetool/report/__init__.py": "",
    "moetool/report/card.py": (
        "from typing import TYPE_CHECKING, Any\n"
        "if TYPE_CHECKING:\n    from moetool.pipeline import Prepared\n"
        "def a(one: Any, two: int) -> tuple[int, int, int]: ...\n"
        "class Job: ...\n"
    ),
    "moetool/pipeline.py": "from moetool.report import card\nclass Job: ...\nclass Prepared: ...\n",
    "moetool/cli/__init__.py": "",
    "moetool/cli/look.py": (
        "def look() -> None:\n    from moetool.cli import main\n"
        "Ratio = Annotated[float, typer.Option(help='one text')]\n"
        "def prune(ratio: Ratio = 0.5, way: Annotated[str, typer.Option(help='x')] = '') -> None: ...\n"
    ),
    "moetool/cli/main.py": "import moetool.cli.look\n",
    "moetool/methods/__init__.py": "",
    "moetool/methods/prune/__init__.py": "",
    "moetool/methods/prune/method.py": (
        "class Prune:\n    ratio: float = option(0.5, 'another text')\n    way: str = option('', 'x')\n"
        "KNOWN = 'one of mine, yours'\n"
    ),
    "moetool/methods/prune/mine.py": "'''mine'''\nclass Mine:\n    name = 'mine'\n",
    "moetool/units.py": (
        "def wide(a, b, c, d, e, f, *, g): return a, b, c\n"
        "pairs = [x for y in z for x in y]\n"
        "nested = 1 if x else 2 if y else 3\n"
        f"long = '{'s' * 120}'\n"
        f"call({', '.join('name' for _ in range(30))})\n"
        "def tall():\n" + "    x = 1\n" * 51
    ),
    "moetool/errors.py": "x = 1\n" * 401,
    "tests/test_it.py": "x = 1\n" * 10,
}


def laid(root: Path, files: dict[str, str]) -> dict[str, house.Row]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {row.what: row for row in house.count(root)}


def test_every_fault_is_counted(tmp_path: Path) -> None:
    rows = laid(tmp_path, FAULTY)
    assert {
        what: row.now for what, row in rows.items() if not what.endswith("by lines of code")
    } == {
        "import circles at run time": 0,
        "... TYPE_CHECKING included": 1,
        "... imports inside functions included": 2,
        "... of folders": 1,
        "imports of a higher floor (by module)": 1,
        "option fields declared twice (methods and cli)": 2,
        "... help texts that differ": 1,
        "functions with more than 6 parameters": 1,
        "... the most": 7,
        "functions over 50 lines": 1,
        "median function, lines": 1,
        "lines over 100 columns": 2,
        "lines over 120 columns": 2,
        "lines over 160 columns": 1,
        "... over 100 that are no whole string": 1,
        "annotations with Any": 1 / 9,
        "... with a JSON object by name": 0,
        "comprehensions with two for": 1,
        "nested conditional expressions": 1,
        "functions that return three or more without a name": 2,
        "files over 400 lines": 1,
        "names that two classes share": 1,
        "files that spell a prune way's name": 1,
        "files that spell a merge way's name": 0,
    }
    # Every row with a goal is missed here, but the circles at run time, the median and merge.
    met = {what for what, row in rows.items() if row.met and row.goal}
    assert met == {
        "import circles at run time",
        "median function, lines",
        "files that spell a merge way's name",
    }
    assert rows["names that two classes share"].places == ("Job 2",)
    assert rows["imports of a higher floor (by module)"].places == (
        "moetool.report.card -> moetool.pipeline",
    )


def test_check_ends_with_1_only_when_a_goal_is_missed(tmp_path: Path) -> None:
    laid(tmp_path / "bad", FAULTY)
    clean = {
        "moetool/__init__.py": "def a() -> int:\n    return 1\n",
        "tests/test_a.py": "x = 1\n" * 2,
    }
    laid(tmp_path / "good", clean)
    assert house.main(["--root", str(tmp_path / "bad"), "--check"]) == 1
    assert house.main(["--root", str(tmp_path / "bad")]) == 0
    assert house.main(["--root", str(tmp_path / "good"), "--check"]) == 0
