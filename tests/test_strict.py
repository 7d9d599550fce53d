"""YAML and JSON as hostile files spell them: the value, or a sentence; never a traceback or a hang."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from moetool import MoetoolError, reading, strict_json, strict_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML: dict[str, tuple[str, str]] = {
    "a name twice": ("method: prune\nmethod: merge\n", "'method' stands twice"),
    "a name twice inside": ("options:\n  ratio: 0.5\n  ratio: 0.25\n", "'ratio' stands twice"),
    "a name twice in braces": ("{a: 1, a: 2}", "stands twice"),
    "a name twice, quoted": ("a: 1\n'a': 2\n", "stands twice"),
    "a number as a name": ("1: a\n", "'1' is no name"),
    "null as a name": ("null: a\n", "'null' is no name"),
    "truth as a name": ("yes: a\n", "'yes' is no name"),
    "bomb": (BOMB, "references unfolded"),
    "itself": ("&a [*a]", "refers to itself"),
    "itself below": ("a: &a {b: {c: *a}}", "refers to itself"),
    "deep": ("[" * 3000 + "]" * 3000, "nested too deeply"),
    "deep blocks": ("- " * 3000 + "a", "nested too deeply"),
    "large": ("a: " + "x" * strict_yaml.LARGEST, "more than"),
    "many": ("[" + "1, " * 20_000 + "1]", "more than"),
    "list as a name": ("? [a]\n: b\n", "no name"),
    "python": ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "no alias": ("a: *b", "undefined alias"),
    "two documents": ("a: 1\n---\nb: 2\n", "document"),
    "date": ("a: 2020-99-99", "month"),
    "digits": ("a: " + "9" * 5000, "limit"),
    "tab": ("a:\n\t- b", "cannot start any token"),
    "control": ("a: \x00", "special characters"),
    "half a pair": ("a: '\ud800'", "special characters"),
    "not closed": ("a: [1, 2", "expected"),
}


@pytest.mark.parametrize("name", YAML)
def test_hostile_yaml(name: str) -> None:
    text, word = YAML[name]
    begun = time.process_time()  # of this process: other work on the machine does not count
    with pytest.raises(ValueError, match=word) as caught:
        strict_yaml.load(text)
    assert time.process_time() - begun < 5 and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: 1", {"a": 1}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("x: &x {a: 1}\ny: {<<: *x, b: 2}", {"x": {"a": 1}, "y": {"a": 1, "b": 2}}),
        ("a: {b: 1}\nc: {b: 1}", {"a": {"b": 1}, "c": {"b": 1}}),
        ("25%", "25%"),
    ],
)
def test_plain_yaml(text: str, value: Any) -> None:
    assert strict_yaml.load(text) == value


JSON = {
    "empty": b"",
    "list": b"[]",
    "number": b"1",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "Latin-1": b'{"a": "\xe9"}',
    "half a pair": b'{"a": "\\ud800"}',
    "half a pair as a name": b'{"\\udfff": 1}',
    "deep": b'{"a":' * 100_000,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "cut": b'{"a": 1',
    "two": b"{}{}",
}


@pytest.mark.parametrize("name", JSON)
def test_hostile_json(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(JSON[name])
    with pytest.raises(MoetoolError, match="model config") as caught:
        strict_json.load(path, "model config")
    assert caught.value.where["file"] == str(path) and caught.value.hint


def test_json_out() -> None:
    said = strict_json.text({"a": [math.nan, (math.inf, 1.5)], "b": "\udcff\u00e9", 3: -math.inf})
    assert json.loads(said) == {"a": [None, [None, 1.5]], "b": "\udcff\u00e9", "3": None}
    assert "\u00e9" in said and said.encode() and "NaN" not in said


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a pipe", "socket"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    begun = time.monotonic()
    with pytest.raises(MoetoolError, match="no regular file") as caught:
        reading.read(path, "recipe")
    assert time.monotonic() - begun < 2 and "-" in caught.value.hint


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    assert reading.read(tmp_path / "x", "recipe", limit=3) == b"123"
    with pytest.raises(MoetoolError, match="too large"):
        reading.read(tmp_path / "x", "recipe", limit=2)
    with pytest.raises(FileNotFoundError):
        reading.read(tmp_path / "absent", "recipe")
