"""What is found in the files of a folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moetool import discover
from moetool.errors import MoetoolError


class Base:
    name = ""


def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> ModuleType:
    folder = tmp_path / "found"
    folder.mkdir()
    for file, name in {"__init__": "", **files}.items():
        body = f"from test_discover import Base\nclass {file.title()}(Base):\n    name = {name!r}\n"
        (folder / f"{file}.py").write_text(body if name else "")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for module in [m for m in sys.modules if m.partition(".")[0] == "found"]:
        monkeypatch.delitem(sys.modules, module)
    return importlib.import_module("found")


def test_classes_come_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = discover.classes(package(tmp_path, monkeypatch, one="z", two="a"), Base)
    assert [(n, c.__name__) for n, c in found.items()] == [("a", "Two"), ("z", "One")]


def test_two_classes_of_one_name_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MoetoolError, match="called 'same'") as error:
        discover.classes(package(tmp_path, monkeypatch, one="same", two="same"), Base)
    assert error.value.where["found"] == "found.one, found.two"
