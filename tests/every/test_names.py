"""Files and modules that the code, the tests and the pages speak of are there."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for folder in ("moetool", "tests") for p in (ROOT / folder).rglob("*.py"))
PAGES = [
    ROOT / "README.md",
    ROOT / "tests" / "bench" / "measured.md",
    *sorted((ROOT / "moetool" / "guide").glob("*.md")),
]
FILE = re.compile(
    r"(?<![\w/.:*-])((?:[\w-]+/)*[\w-]+\.(?:py|md|json|yaml|txt)|(?:[\w-]+/){2,})(?![\w/*])"
)
MODULE = re.compile(r"\bmoetool(?:\.[a-z_]\w*)+(?![\w(/])")
# What moetool writes, or reads from others; and words for any file of a kind.
WRITTEN = {
    "config.json",
    "report.json",
    "decisions.json",
    "experts.json",
    "moetool.json",
    "done.json",
}
FOLDERS = (
    "",
    "moetool",
    "moetool/methods",
    "moetool/surgery",
    "moetool/archs",
    "tests",
    "tests/every",
)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of every comment and docstring (any string of three quotes)."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT or token.string.startswith(('"""', "'''")):
            yield from enumerate(token.string.splitlines(), token.start[0])


def missing(path: Path, lines: Iterator[tuple[int, str]]) -> list[str]:
    """Names in these lines that stand for nothing."""
    found = []
    for number, line in lines:
        for name in FILE.findall(line):
            if "/" in name and not there(name, path):
                found.append(f"{path.relative_to(ROOT)}:{number} {name}")
        for name in MODULE.findall(line):
            if name not in WRITTEN and not importable(name):
                found.append(f"{path.relative_to(ROOT)}:{number} {name}")
    return found


def there(name: str, near: Path) -> bool:
    """Whether a path exists from the root, from a floor, or from the file that names it; capitals
    (NAME.py) stand for any name.
    """
    if name.rpartition("/")[2] in WRITTEN or re.search(r"\b[A-Z]{2,}\b", name):
        return True
    bases = [ROOT / folder for folder in FOLDERS] + [near.parent]
    ours = [base for base in bases if (base / name.partition("/")[0]).exists()]
    return not ours or any((base / name).exists() for base in ours)  # else another project's


def importable(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:cut])
        if path.is_dir() or path.with_suffix(".py").exists():
            return cut == len(parts) or spelled(path, parts[cut])
    return find_spec(name) is not None


def spelled(path: Path, word: str) -> bool:
    """Whether a module's own text has the word."""
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return re.search(rf"\b{word}\b", file.read_text()) is not None


def test_what_is_named_exists() -> None:
    found = [fault for path in SOURCES for fault in missing(path, prose(path))]
    for path in PAGES:
        found += missing(path, enumerate(path.read_text().splitlines(), 1))
    assert found == []


def test_a_name_of_nothing_is_found() -> None:
    lines = ["see tests/bench/nothing.py and moetool/methods/upcycle/scale.py", "moetool.gone.by"]
    found = missing(Path(__file__), enumerate(lines, 1))
    assert [f.split()[1] for f in found] == ["tests/bench/nothing.py", "moetool.gone.by"]
