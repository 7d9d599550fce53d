"""Statistics are of the very weights, layers and text that they say they are of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Done
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

Run = Callable[..., Done]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}\n' * 4)
    return tmp_path / "ids.jsonl"


@pytest.fixture
def base(models: Callable[..., Path]) -> Path:
    return models("qwen3_moe")


def tuned(base: Path, folder: Path, name: str = "lm_head.weight") -> Path:
    """The same model after training: same names, same shapes, one number is another."""
    shutil.copytree(base, folder)
    arrays = load_file(folder / "model.safetensors")
    arrays[name].reshape(-1)[-7] += 1.0
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def profiled(moetool: Run, model: Path, stats: Path, text: Path) -> Done:
    return moetool(
        "profile", model, stats, "--calibrate", text, "--tokens", 32, "--seq-len", 8, "--sample", 8
    )


def test_statistics_of_a_base_are_not_those_of_its_fine_tune(
    base: Path, text: Path, tmp_path: Path, moetool: Run
) -> None:
    assert profiled(moetool, base, tmp_path / "stats", text).returncode == 0
    other = tuned(base, tmp_path / "tuned")
    done = moetool("prune", other, tmp_path / "out", "--stats", tmp_path / "stats")
    assert done.returncode == 1 and "another model" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
    done = profiled(moetool, other, tmp_path / "stats", text)
    assert done.returncode == 1 and "another model" in done.stderr, done.stderr


def test_the_same_bytes_elsewhere_are_the_same_model(
    base: Path, text: Path, tmp_path: Path, moetool: Run
) -> None:
    assert profiled(moetool, base, tmp_path / "stats", text).returncode == 0
    again = tmp_path / "downloaded again"
    shutil.copytree(base, again, copy_function=shutil.copyfile)
    done = moetool("prune", again, tmp_path / "out", "--stats", tmp_path / "stats")
    assert done.returncode == 0, done.stderr
    assert profiled(moetool, again, tmp_path / "stats", text).returncode == 0


def swapped(stats: Path) -> None:
    one, two = stats / "layer-00001.safetensors", stats / "layer-00002.safetensors"
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def renamed(stats: Path) -> None:
    """Swapped by somebody who knows that the layer's number stands in each name."""
    rewritten(stats, lambda arrays: {k.replace("1.", "2.", 1): v for k, v in arrays.items()})


def not_a_number(stats: Path) -> None:
    def harm(arrays: dict[str, Any]) -> dict[str, Any]:
        arrays["1.reap"][:] = np.nan
        return arrays

    rewritten(stats, harm)


def rewritten(stats: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    name = stats / "layer-00001.safetensors"
    with safe_open(name, "np") as handle:
        metadata = handle.metadata()
    save_file(change(load_file(name)), name, metadata=metadata)


@pytest.mark.parametrize("harm", [swapped, renamed, not_a_number])
@pytest.mark.parametrize("sealed", [True, False], ids=["as made", "by 0.2.0"])
def test_changed_layer_files_are_refused(
    harm: Callable[[Path], None],
    sealed: bool,
    base: Path,
    text: Path,
    tmp_path: Path,
    moetool: Run,
) -> None:
    stats = tmp_path / "stats"
    assert profiled(moetool, base, stats, text).returncode == 0
    if not sealed:
        facts = json.loads((stats / "profile.json").read_text())
        del facts["layer_files"], facts["model"]["content"]
        (stats / "profile.json").write_text(json.dumps(facts))
    harm(stats)
    done = moetool("prune", base, tmp_path / "out", "--stats", stats)
    assert done.returncode == 1 and "layer-00001" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
