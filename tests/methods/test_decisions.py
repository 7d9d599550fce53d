"""Decisions that a person edited: whatever does not hold together is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Done

Run = Callable[..., Done]
Layer = dict[str, Any]
KEEP = {"keep": [0, 1, 2, 3, 4, 5]}
GROUPS = {"groups": [[0, 1, 2], [3], [4], [5], [6], [7]]}
HALF = [[0.5, 0.25, 0.25], [1.0], [1.0], [1.0], [1.0], [1.0]]

LAYERS: dict[str, tuple[str, Layer]] = {
    "string": ("prune", {"keep": ["0", 1, 2, 3, 4, 5]}),
    "float": ("prune", {"keep": [0.0, 1, 2, 3, 4, 5]}),
    "fraction": ("prune", {"keep": [0.5, 1, 2, 3, 4, 5]}),
    "boolean": ("prune", {"keep": [False, True, 2, 3, 4, 5]}),
    "null": ("prune", {"keep": [None, 1, 2, 3, 4, 5]}),
    "text for a list": ("prune", {"keep": "012345"}),
    "negative": ("prune", {"keep": [-1, 1, 2, 3, 4, 5]}),
    "both": ("merge", KEEP | GROUPS),
    "unknown key": ("prune", KEEP | {"note": "mine"}),
    "sparsity 5": ("prune", KEEP | {"sparsity": 5}),
    "sparsity -1": ("prune", KEEP | {"sparsity": -1}),
    "sparsity in words": ("prune", KEEP | {"sparsity": "0.5"}),
    "sparsity true": ("prune", KEEP | {"sparsity": True}),
    "sparsity in merge": ("merge", KEEP | {"sparsity": 0.5}),
    "constants in merge": ("merge", KEEP | {"constant": [1]}),
    "groups in prune": ("prune", GROUPS),
    "strange constant": ("prune", KEEP | {"constant": [7]}),
    "strange protected": ("prune", KEEP | {"protected": [7]}),
    "scores": ("prune", KEEP | {"scores": [1.0]}),
    "score in words": ("prune", KEEP | {"scores": ["1"] * 8}),
    "negative weight": ("merge", GROUPS | {"weights": [[1.5, -0.25, -0.25], *HALF[1:]]}),
    "weight in words": ("merge", GROUPS | {"weights": [["1", 0, 0], *HALF[1:]]}),
    "weight true": ("merge", GROUPS | {"weights": [[True, 0, 0], *HALF[1:]]}),
    "order too short": ("merge", GROUPS | {"orders": {"1": [1, 0]}}),
    "order of a stranger": (
        "merge",
        {"groups": [[0], [1], [2], [3], [4], [5]]} | {"orders": {"7": list(range(48))}},
    ),
    "order 01": ("merge", GROUPS | {"orders": {"01": list(range(48))}}),
    "order twice": ("merge", GROUPS | {"orders": {"1": [0] * 48}}),
    "a list": ("prune", [0, 1, 2, 3, 4, 5]),  # type: ignore[dict-item]
}


def file(folder: Path, verb: str, layer: Layer, **more: Any) -> Path:
    usual = KEEP if verb == "prune" else GROUPS
    layers = {str(n): usual for n in (1, 2)} | {"3": layer}
    data = {"schema": 1, "verb": verb, "method": "", "experts": 8, "layers": layers} | more
    (folder / "d.json").write_text(json.dumps(data))
    return folder / "d.json"


@pytest.fixture
def model(models: Callable[..., Path]) -> Path:
    return models("qwen3_moe")  # layer 0 is dense


def refused(moetool: Run, verb: str, model: Path, decisions: Path, *more: object) -> str:
    out = decisions.parent / "out"
    done = moetool(verb, model, out, "--decisions", decisions, *more)
    assert done.returncode in (1, 2) and "next:" in done.stderr, (done.returncode, done.stderr)
    assert not out.exists() and str(decisions) in done.stderr
    return done.stderr


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_does_not_hold_together(
    name: str, model: Path, tmp_path: Path, moetool: Run
) -> None:
    verb, layer = LAYERS[name]
    said = refused(moetool, verb, model, file(tmp_path, verb, layer))
    assert "layer 3" in said


@pytest.mark.parametrize(
    "text",
    [
        '{"schema": 1, "schema": 1, "experts": 8, "layers": {}}',
        '{"schema": 1, "experts": 8, "layers": {"1": {}, "1": {}}}',
        '{"schema": 1, "experts": 8.0, "layers": {}}',
        '{"schema": 1, "experts": true, "layers": {}}',
        '{"schema": 1, "experts": NaN, "layers": {}}',
        '{"schema": 1, "experts": 1' + "0" * 5000 + ', "layers": {}}',
        "[" * 100_000,
        "",
    ],
    ids=["twice", "layer twice", "float", "true", "NaN", "endless", "deep", "empty"],
)
def test_a_file_that_is_none(text: str, model: Path, tmp_path: Path, moetool: Run) -> None:
    (tmp_path / "d.json").write_text(text)
    refused(moetool, "prune", model, tmp_path / "d.json")


def test_layers_are_written_one_way(model: Path, tmp_path: Path, moetool: Run) -> None:
    for number in ("00", "03", "+3", "³", "3.0", "9" * 5000):
        decisions = file(tmp_path, "prune", KEEP, layers={"1": KEEP, "2": KEEP, number: KEEP})
        assert "not a number" in refused(moetool, "prune", model, decisions)


def test_unknown_keys_and_other_verbs(model: Path, tmp_path: Path, moetool: Run) -> None:
    said = refused(moetool, "prune", model, file(tmp_path, "prune", KEEP, expert=8))
    assert "did you mean experts" in said
    said = refused(moetool, "merge", model, file(tmp_path, "prune", KEEP))
    assert "another verb" in said


def test_a_ratio_that_says_something_else_is_said(
    model: Path, tmp_path: Path, moetool: Run
) -> None:
    decisions = file(tmp_path, "prune", KEEP)
    done = moetool("prune", model, tmp_path / "a", "--decisions", decisions, "--ratio", 0.5)
    assert done.returncode == 0, done.stderr
    assert "--ratio 0.5 is not used: the decisions keep 18 of 24 experts" in done.stderr
    done = moetool("prune", model, tmp_path / "b", "--decisions", decisions, "--ratio", 0.25)
    assert done.returncode == 0 and "not used" not in done.stderr
