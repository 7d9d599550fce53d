"""A comma in a file name is part of the name, wherever files are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done

import moetool as api


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "a,b"
    folder.mkdir()
    (folder / "c,d.jsonl").write_text('{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}\n' * 4)
    return folder / "c,d.jsonl"


def test_on_the_command_line_in_python_and_in_recipes(
    text: Path, models: Callable[..., Path], tmp_path: Path, moetool: Callable[..., Done]
) -> None:
    source = str(models("mixtral"))
    more = ["--text", text, "--max-kl", 99, "--seq-len", 8]
    out = tmp_path / "x,1"
    for said in (["--calibrate", text], ["--calibrate", f"{text}:0.5", "--calibrate", text]):
        done = moetool("prune", source, out, *said, *more, "--overwrite")
        assert done.returncode == 0, done.stderr
    assert moetool("eval", out, "--text", text, "--reference", source).returncode == 0
    for given in (str(text), [str(text)], (str(text),)):
        api.prune(source, str(out), calibrate=given, seq_len=8, overwrite=True)
    recipe = tmp_path / "r,1.yaml"
    for written in (f'"{text}"', f'["{text}"]'):
        recipe.write_text(
            f'paper: "none"\nabout: a test\nmethod: prune\nsource: "{source}"\nout: "{out}"\n'
            f"options:\n  calibrate: {written}\n  seq-len: 8\n"
        )
        done = moetool("run", recipe, "--overwrite")
        assert done.returncode == 0, done.stderr
    done = moetool("run", "reap", "--set", f"source={source}", "--set", f"out={out}")
    assert done.returncode == 2
    told = ["--set", f"source={source}", "--set", f"out={tmp_path / 'y'}"]
    done = moetool("run", "reap", *told, "--set", f"calibrate={text}", "--set", "seq-len=8")
    assert done.returncode == 0, done.stderr
