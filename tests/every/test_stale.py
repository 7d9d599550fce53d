"""An output that stands is only called finished when its sources are still what it was made from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done, tree
from safetensors.numpy import load_file, save_file

Run = Callable[..., Done]
STILL = ("--method", "router-distance")  # nothing runs: copies alone


@pytest.fixture
def source(models: Callable[..., Path], tmp_path: Path) -> Path:
    shutil.copytree(models("mixtral"), tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    return tmp_path / "model"


def trained(model: Path, *, same_time: bool = False) -> None:
    """One number is another; name, shape and, where asked, time of the file stay."""
    file = model / "model.safetensors"
    then = file.stat()
    arrays = load_file(file)
    arrays["model.layers.1.self_attn.q_proj.weight"].reshape(-1)[1234] += 1.0
    save_file(arrays, file, metadata={"format": "pt"})
    if same_time:
        os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))


def made(moetool: Run, source: Path, *more: object) -> Done:
    return moetool("prune", source, source.parent / "out", *STILL, *more)


@pytest.mark.parametrize("same_time", [False, True])
def test_changed_weights_are_seen(source: Path, same_time: bool, moetool: Run) -> None:
    assert made(moetool, source).returncode == 0
    before = tree(source.parent / "out")
    trained(source, same_time=same_time)
    done = made(moetool, source)
    assert done.returncode == 2 and "has changed since" in done.stderr, done.stderr
    assert tree(source.parent / "out") == before
    assert made(moetool, source, "--overwrite").returncode == 0
    assert tree(source.parent / "out") != before
    assert "already there" in made(moetool, source).stderr


def test_large_files_are_looked_at_in_blocks_and_then_whole(
    source: Path, moetool: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the blocks of a seal do not show, a file that was touched since does."""
    from moetool.surgery import identity

    monkeypatch.setattr(identity, "WHOLE", 0)
    monkeypatch.setattr(identity, "BLOCK", 64)
    assert made(moetool, source).returncode == 0
    record = json.loads((source.parent / "out" / "moetool.json").read_text())
    assert record["sources"][0]["content"][0][1].startswith("sample:")
    trained(source, same_time=True)
    done = made(moetool, source)
    assert done.returncode == 2 and "q_proj" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_changed_small_files_are_seen(source: Path, name: str, moetool: Run) -> None:
    """A config is part of the plan; a tokenizer is not, but it travels."""
    assert made(moetool, source).returncode == 0
    data = json.loads((source / name).read_text())
    (source / name).write_text(json.dumps(data | {"pad_token_id": 1}))
    done = made(moetool, source)
    said = "not empty" if name == "config.json" else name
    assert done.returncode == 2 and said in done.stderr, done.stderr


def test_the_same_bytes_elsewhere_are_no_change(source: Path, moetool: Run) -> None:
    assert made(moetool, source).returncode == 0
    before = tree(source.parent / "out")
    shutil.copytree(source, source.parent / "again", copy_function=shutil.copyfile)
    shutil.rmtree(source)
    (source.parent / "again").rename(source)
    done = made(moetool, source)
    assert done.returncode == 0 and "already there" in done.stderr, done.stderr
    assert tree(source.parent / "out") == before
    assert moetool("verify", source.parent / "out", "--against", source).returncode == 0


def test_verify_says_that_the_weights_are_others(source: Path, moetool: Run) -> None:
    assert made(moetool, source).returncode == 0
    trained(source, same_time=True)
    done = moetool("verify", source.parent / "out", "--against", source)
    assert done.returncode == 4 and "other weights" in done.stderr, done.stderr


def test_outputs_of_0_2_0_are_held_against_their_source(source: Path, moetool: Run) -> None:
    assert made(moetool, source).returncode == 0
    record = source.parent / "out" / "moetool.json"
    data = json.loads(record.read_text())
    del data["sources"][0]["content"]
    record.write_text(json.dumps(data))
    assert "already there" in made(moetool, source).stderr
    trained(source)
    assert made(moetool, source).returncode == 2
