"""A source with a hole, or with a tensor of another shape than its config says, goes through no
verb.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done
from safetensors.numpy import load_file, save_file

Run = Callable[..., Done]
VERBS = (
    "prune",
    "merge",
    "extend",
    "convert-layout",
    "upcycle",
    "profile",
    "eval",
    "eval --reference",
)
HOLES = ("lm_head", "model.norm", "layers.1.self_attn.q_proj", "layers.3.", "down_proj")


def arguments(verb: str, whole: Path, broken: Path, folder: Path) -> list[object]:
    text = folder / "ids.jsonl"
    text.write_text('{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}\n' * 4)
    return {
        "prune": ["prune", broken, folder / "out", "--method", "router-distance"],
        "merge": ["merge", broken, folder / "out", "--calibrate", text],
        "extend": ["extend", broken, folder / "out", "--copy-expert", 0],
        "convert-layout": ["convert-layout", broken, folder / "out", "--to", "fused"],
        "upcycle": ["upcycle", broken, folder / "out", "--experts", 4],
        "profile": ["profile", broken, folder / "out", "--calibrate", text],
        "eval": ["eval", broken, "--text", text],
        "eval --reference": ["eval", whole, "--text", text, "--reference", broken],
    }[verb]


def broken(model: Path, folder: Path, hole: str) -> Path:
    shutil.copytree(model, folder)
    arrays = load_file(folder / "model.safetensors")
    gone = [n for n in arrays if hole in n]
    if hole == "down_proj":
        gone = gone[-1:]  # of one expert that stays
    for name in gone:
        del arrays[name]
    assert gone
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_takes_a_source_with_a_hole(
    verb: str, hole: str, models: Callable[..., Path], tmp_path: Path, moetool: Run
) -> None:
    whole = models("qwen3" if verb == "upcycle" else "qwen3_moe")
    source = broken(whole, tmp_path / "model", hole)
    done = moetool(*arguments(verb, whole, source, tmp_path))
    assert done.returncode == 1 and "missing" in done.stderr, done.stderr
    assert hole in done.stderr and all(
        word in done.stderr for word in ("file:", "tensor:", "expected:", "found:", "next:")
    )
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_takes_tensors_of_other_shapes(
    verb: str, models: Callable[..., Path], tmp_path: Path, moetool: Run
) -> None:
    whole = models("qwen3" if verb == "upcycle" else "qwen3_moe")
    source = tmp_path / "model"
    shutil.copytree(whole, source)
    arrays = load_file(source / "model.safetensors")
    name = next(n for n in sorted(arrays) if "down_proj" in n)
    arrays[name] = arrays[name].T.copy()
    save_file(arrays, source / "model.safetensors", metadata={"format": "pt"})
    done = moetool(*arguments(verb, whole, source, tmp_path))
    assert done.returncode == 1 and name in done.stderr and "shape" in done.stderr, done.stderr
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_more_layers_in_the_config_than_on_disk(
    models: Callable[..., Path], tmp_path: Path, moetool: Run
) -> None:
    shutil.copytree(models("qwen3_moe"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    done = moetool("prune", tmp_path / "model", tmp_path / "out")
    assert done.returncode == 1 and "layers.4." in done.stderr, done.stderr


def test_what_cannot_be_counted_is_said(
    models: Callable[..., Path], tmp_path: Path, moetool: Run
) -> None:
    done = moetool("upcycle", models("lfm2"), tmp_path / "out", "--experts", 4)
    assert done.returncode == 0 and "were not counted" in done.stderr, done.stderr
