"""Files are whole or not there, whatever happens on the way; and nobody renames files elsewhere."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import moetool
from moetool import atomic
from moetool.errors import MoetoolError
from moetool.progress import Stage, silent

PACKAGE = Path(moetool.__file__).parent


@pytest.fixture
def renames(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every rename that is made through os.replace: (from, to) names."""
    seen: list[tuple[str, str]] = []
    real = os.replace

    def replace(a: Path, b: Path) -> None:
        seen.append((Path(a).name, Path(b).name))
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    return seen


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("data", "there"), [("grüße\n", "grüße\n".encode()), (b"\0\xff", b"\0\xff"), ("", b"")]
)
def test_write_is_one_rename(
    data: str | bytes, there: bytes, tmp_path: Path, renames: list[tuple[str, str]]
) -> None:
    path = tmp_path / "report.json"
    path.write_text("before")
    atomic.write(path, data)
    assert path.read_bytes() == there
    assert renames == [("report.json.tmp", "report.json")] and names(tmp_path) == ["report.json"]


def test_copy_is_one_rename_and_leaves_the_original(
    tmp_path: Path, renames: list[tuple[str, str]]
) -> None:
    (tmp_path / "a").write_bytes(b"x" * 70_000)
    atomic.copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert renames == [("b.tmp", "b")]


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_alone(
    problem: type[BaseException], tmp_path: Path, renames: list[tuple[str, str]]
) -> None:
    path = tmp_path / "solved.safetensors"
    path.write_text("old")
    with pytest.raises(problem), atomic.writing(path) as temporary:
        temporary.write_text("half of the n")
        raise problem
    assert path.read_text() == "old" and names(tmp_path) == [path.name] and not renames


def test_nothing_has_the_name_before_the_block_ends(tmp_path: Path) -> None:
    with atomic.writing(tmp_path / "x") as temporary:
        temporary.write_text("whole")
        assert names(tmp_path) == ["x.tmp"]
    assert names(tmp_path) == ["x"]


def test_the_same_bytes_keep_their_time(tmp_path: Path, renames: list[tuple[str, str]]) -> None:
    path = tmp_path / "solved"
    path.write_text("same")
    os.utime(path, (1, 1))
    with atomic.writing(path, keep_same=True) as temporary:
        temporary.write_text("same")
    assert path.stat().st_mtime == 1 and not renames and names(tmp_path) == ["solved"]
    with atomic.writing(path, keep_same=True) as temporary:
        temporary.write_text("else")
    assert path.read_text() == "else" and path.stat().st_mtime > 1 and len(renames) == 1


def test_sweep_removes_only_what_is_half_written(tmp_path: Path) -> None:
    for name in ("a.json", "a.json.tmp", "b.safetensors.tmp", "tmp", "c.tmp.json"):
        (tmp_path / name).write_text("")
    atomic.sweep(tmp_path)
    assert names(tmp_path) == ["a.json", "c.tmp.json", "tmp"]


def folder(path: Path, word: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(word)
    return path


@pytest.mark.parametrize("there", ["nothing", "empty"])
def test_a_folder_moves_in_one_rename(
    there: str, tmp_path: Path, renames: list[tuple[str, str]]
) -> None:
    staging, out = folder(tmp_path / ".out.moetool", "new"), tmp_path / "out"
    if there == "empty":
        out.mkdir()
    atomic.publish_folder(staging, out)
    assert (out / "config.json").read_text() == "new" and names(tmp_path) == ["out"]
    assert renames == [(".out.moetool", "out")]


def test_a_folder_that_was_filled_meanwhile_is_left_alone(tmp_path: Path) -> None:
    staging, out = folder(tmp_path / ".out.moetool", "new"), folder(tmp_path / "out", "theirs")
    with pytest.raises(MoetoolError, match="filled while moetool worked") as caught:
        atomic.publish_folder(staging, out)
    assert caught.value.hint and (out / "config.json").read_text() == "theirs"
    assert (staging / "config.json").read_text() == "new"


def test_overwriting_swaps_folders_and_removes_the_old_one(
    tmp_path: Path, renames: list[tuple[str, str]]
) -> None:
    staging, out = folder(tmp_path / ".out.moetool", "new"), folder(tmp_path / "out", "old")
    folder(tmp_path / ".out.moetool-old", "left by a killed run")
    atomic.publish_folder(staging, out, overwrite=True)
    assert (out / "config.json").read_text() == "new" and names(tmp_path) == ["out"]
    assert renames == [("out", ".out.moetool-old"), (".out.moetool", "out")]


def test_other_trouble_is_not_renamed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic.publish_folder(tmp_path / "absent", tmp_path / "out")


def calls(wanted: Callable[[str, str], bool]) -> set[str]:
    """Files of the package that call `thing.method(...)` for which `wanted(thing, method)`."""
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and wanted(node.func.value.id, node.func.attr)
    }


def test_only_atomic_renames() -> None:
    assert calls(lambda a, b: a == "os" and b in ("replace", "rename", "renames")) == {"atomic.py"}
    assert not calls(lambda a, b: a == "shutil" and b == "move")


def test_one_progress() -> None:
    """The signature is written once, and so is the one that nobody hears."""
    texts = {p: p.read_text() for p in PACKAGE.rglob("*.py")}
    spelled = [p.name for p, text in texts.items() if "Callable[[Stage, int, int], None]" in text]
    assert spelled == ["progress.py"]
    assert not [p.name for p, text in texts.items() if "lambda *a: None" in text]
    silent(Stage("check"), 1, 2)
