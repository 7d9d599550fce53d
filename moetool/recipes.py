"""The recipes that come with moetool: found by name wherever it is installed.

They lie in `recipes/` of the repository, which an editable installation reads; a wheel brings them
as data files, and its own list of files says where they went.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

from moetool import strict_yaml
from moetool.errors import UsageError, did_you_mean

_SHARED = ("share", "moetool", "recipes")  # as pyproject.toml has it


class Shipped(NamedTuple):
    """A recipe of ours."""

    name: str
    file: Path
    method: str
    paper: str
    about: str


def find(name: str) -> Path:
    """The file of a recipe: a path, or the name of one of ours; UsageError for neither."""
    path = Path(name).expanduser()
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    known = _files()
    if name not in known:
        raise UsageError(
            f"there is no recipe {name!r}",
            expected="a YAML file, or a name that `moetool run --list` shows",
            hint=did_you_mean(name, known),
        )
    return known[name]


def shipped() -> list[Shipped]:
    """All recipes of ours, by verb and name."""
    found = []
    for name, file in _files().items():
        data = strict_yaml.load(file.read_text())
        about = " ".join(str(data["about"]).split())
        verbs = [step["method"] for step in data.get("steps") or [data]]
        found.append(Shipped(name, file, " + ".join(verbs), str(data["paper"]), about))
    return sorted(found, key=lambda r: (r.method, r.name))


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    """name -> file."""
    for folder in (Path(__file__).resolve().parent.parent / "recipes", *_installed()):
        found = {p.stem: p for p in sorted(folder.glob("*/*.yaml"))}
        if found:
            return found
    return {}


def _installed() -> list[Path]:
    """Where an installation of the wheel may have put them."""
    folders = [Path(sys.prefix, *_SHARED)]
    try:
        told = files("moetool") or []
    except PackageNotFoundError:
        told = []
    for file in told:
        if file.suffix == ".yaml" and file.parts[-5:-2] == _SHARED:
            folders.insert(0, Path(str(file.locate())).resolve().parent.parent)
            break
    # `pip install --target DIR` moves them without writing it down
    return [*folders, Path(__file__).resolve().parent.parent.joinpath(*_SHARED)]
