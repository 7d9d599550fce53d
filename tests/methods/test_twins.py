"""Equal experts are merged before any others, whichever way clusters them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import twins as with_twins

import moetool
from moetool.methods.merge.parts import twins
from moetool.methods.reduce.decided import Decided
from moetool.methods.reduce.view import Eye, View
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture

Models = Callable[..., Path]
PAIRS = {(0, 4), (1, 5), (2, 6), (3, 7)}


@pytest.fixture(scope="module")
def source(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts 4..7 are those of 0..3; their router rows are others."""
    out = tmp_path_factory.mktemp("twins") / "source"
    return with_twins(models("mixtral", num_experts_per_tok=1), out, router=False)


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_they_are_found_by_their_bytes(
    layout: str, source: Path, models: Models, tmp_path: Path
) -> None:
    if layout == "fused":
        moetool.convert_layout(str(source), str(tmp_path / "fused"), to="fused")
        source = tmp_path / "fused"
    mixture = Mixture.of(Checkpoint.open(source))
    view = View(mixture, mixture.layers[0], Eye("alike", 0))
    assert {tuple(same) for same in twins.found(view, range(8))} == PAIRS
    assert twins.found(view, [0, 1, 2, 7]) == []
    alone = View(Mixture.of(Checkpoint.open(models("mixtral"))), 0, Eye("alike", 0))
    assert twins.found(alone, range(8)) == []


def test_no_more_go_than_must() -> None:
    classes = [[0, 3, 5], [1, 2]]
    assert twins.together(classes, 1) == {0: [0, 3]}
    assert twins.together(classes, 2) == {0: [0, 3, 5]}
    assert twins.together(classes, 7) == {0: [0, 3, 5], 1: [1, 2]}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "alike", "features": "router", "cluster": "kmeans"},
        {"cluster": "ream"},
        {"cluster": "ward", "features": "svd", "combine": "mean"},
    ],
    ids=str,
)
def test_every_way_merges_them_first(options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    text = {"tokens": 256, "seq_len": 64} if "method" not in options else {}
    said = {"ratio": 0.5, "protect": False, "dry_run": True, **text, **options}
    report = moetool.merge(str(source), str(tmp_path / "out"), **said)
    for layer in Decided.from_json(report["decisions"]).layers.values():
        assert {tuple(sorted(group)) for group in layer.groups} == PAIRS
    some = moetool.merge(str(source), str(tmp_path / "out"), **(said | {"ratio": 0.25}))
    for layer in Decided.from_json(some["decisions"]).layers.values():
        joined = {tuple(sorted(group)) for group in layer.groups if len(group) > 1}
        assert len(joined) == 2 and joined < PAIRS
