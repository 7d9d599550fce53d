"""The tools that hold the house together find nothing to say; and the commands of README and the
guide do what these show.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "moetool" / "guide").glob("*.md"))]


@pytest.mark.parametrize(
    "tool",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["importlinter.cli", "lint"],
        ["tests.bench.house", "--check"],
    ],
    ids=["ruff", "ruff-format", "mypy", "import-linter", "house"],
)
def test_tools(tool: list[str]) -> None:
    command = (
        [sys.executable, "-m", *tool]
        if tool[0] != "importlinter.cli"
        else [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
        ]
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def blocks(page: Path) -> list[list[str]]:
    """The commands of every ```sh block of a page (lines that begin with `moetool`)."""
    found = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    return [
        [line.split("  #")[0].strip() for line in block.splitlines() if line.startswith("moetool ")]
        for block in found
    ]


def unloaded(words: list[str]) -> list[str]:
    """A command of quantize without the process that loads what was written."""
    if words[1] == "quantize":
        return [*words, "--no-loader-check"]
    if words[1] == "run" and "recipes/quantize/" in words[2]:
        return [*words, "--set", "loader-check=false"]
    return words


def tour(page: Path) -> list[list[str]]:
    """The words of every command of a page, in order."""
    return [shlex.split(command) for block in blocks(page) for command in block]


TYPED = [page for page in PAGES if tour(page)]


def test_pages_show_commands() -> None:
    assert len(TYPED) == 4 and sum(len(tour(page)) for page in TYPED) >= 40


# Imports once what commands need, and runs each in a forked child, as a shell would.
FORKER = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import scipy.cluster.hierarchy, sklearn.cluster, torch, transformers
from moetool.cli import main
for words in json.load(sys.stdin):
    child = os.fork()
    if not child:
        status = main(words[1:])
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"{words}: {status}")
"""


def test_commands_of_readme_run(tmp_path: Path) -> None:
    """In order, in one folder; the process that loads what quantize wrote is left out."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = subprocess.run(
        [sys.executable, "-c", FORKER],
        input=json.dumps([unloaded(words) for words in tour(PAGES[0])]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", TYPED, ids=lambda page: page.stem)
def test_commands_run_as_typed(page: Path, tmp_path: Path) -> None:
    """In order, in one folder a page, as a stranger would type them."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for words in tour(page):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "moetool", *words[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ},
        )
        assert done.returncode == 0, f"{words}\n{done.stderr}"


def test_pages_name_every_command_and_option_group() -> None:
    text = "".join(map(Path.read_text, PAGES))
    for name in (
        "demo",
        "inspect",
        "upcycle",
        "verify",
        "run",
        "archs",
        "methods",
        "guide",
        "convert-layout",
        "profile",
        "eval",
        "prune",
        "merge",
    ):
        assert f"moetool {name}" in text
    from moetool import methods
    from moetool.methods import described

    for name in methods.METHODS:
        assert f"moetool {name}" in text
    for verb in ("upcycle", "prune", "merge"):
        for option in described.describe(verb)["options"]:
            assert f"--{option['name']}" in text, option["name"]
        for way in described.describe(verb).get("methods", ()):
            assert re.search(f"`(--form )?{way['name']}`", text), way["name"]
    from moetool.surgery.pair import pairs

    for pair in pairs():
        assert re.search(rf"\b{pair.source}\b", text) and re.search(rf"\b{pair.target}\b", text)
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        assert recipe.stem in text
    for code in ("| 0 |", "| 1 |", "| 2 |", "| 3 |", "| 4 |"):
        assert code in text


def test_changelog_speaks_of_this_version() -> None:
    import moetool

    assert f"## [{moetool.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version = "{moetool.__version__}"' in (ROOT / "pyproject.toml").read_text()
