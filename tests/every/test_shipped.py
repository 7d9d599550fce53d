"""The recipes that come with moetool are there wherever and however it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done

REPO = Path(__file__).resolve().parent.parent.parent
NAMES = {p.stem for p in (REPO / "recipes").glob("*/*.yaml")}


def test_they_have_names_of_their_own_and_are_listed(moetool: Callable[..., Done]) -> None:
    assert len(NAMES) == len(list((REPO / "recipes").glob("*/*.yaml"))) >= 24
    listed = moetool("run", "--list", "--json").json["recipes"]
    assert {r["name"] for r in listed} == NAMES and all(r["paper"] and r["about"] for r in listed)
    done = moetool("run", "--list")
    assert done.returncode == 0 and all(name in done.stdout for name in NAMES)


def test_they_run_by_name(
    models: Callable[..., Path], tmp_path: Path, moetool: Callable[..., Done]
) -> None:
    told = ["--set", f"source={models('llama')}", "--set", f"out={tmp_path / 'out'}"]
    assert moetool("run", "moe-llava", *told).returncode == 0
    done = moetool("run", "moe-lava", *told)
    assert done.returncode == 2 and "did you mean moe-llava" in done.stderr, done.stderr
    done = moetool("run")
    assert done.returncode == 2 and "--list" in done.stderr, done.stderr


@pytest.mark.parametrize("how", ["wheel", "target"])
def test_a_wheel_holds_them(how: str, tmp_path: Path) -> None:
    """Built from a copy, put where no repository is near, and asked."""
    import shutil

    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("moetool", "recipes"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPO / name, source / name)
    wheel_of = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*wheel_of, "-w", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    assert {Path(n).stem for n in held if n.endswith(".yaml")} == NAMES
    if how == "wheel":
        return
    target = tmp_path / "target"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "moetool", "run", "--list", "--json"],
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    recipes = json.loads(done.stdout)["recipes"]
    assert {r["name"] for r in recipes} == NAMES
    assert all(r["file"].startswith(str(target)) for r in recipes)
