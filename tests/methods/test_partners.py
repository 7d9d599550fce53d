"""Options that do nothing without another one are refused, not ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done

from moetool import methods
from moetool.methods.options import Common, Gate, Solving, Text, fields

ALONE = {
    "text_field": ("prune", "--text-field", "body"),
    "trust_remote_code": ("prune", "--trust-remote-code"),
    "text_tokens": ("prune", "--text-tokens", "100"),
    "ray_address": ("prune", "--ray-address", "auto"),
}
OTHERS = [
    ("merge", "--rank-energy", "0.5"),
    ("merge", "--density", "0.5"),
    ("merge", "--form", "factored"),
    ("prune", "--total-sparsity", "0.5"),
    ("prune", "--sample", "-1"),
    ("upcycle", "--trunk", "mean"),
    ("upcycle", "--trunk", "weights:0.5,0.5"),
    ("upcycle", "--trunk", "interp:0.5"),
]


@pytest.mark.parametrize("words", [*ALONE.values(), *OTHERS], ids=lambda w: "".join(w[:2]))
def test_alone_they_are_refused(
    words: tuple[str, ...],
    models: Callable[..., Path],
    tmp_path: Path,
    moetool: Callable[..., Done],
) -> None:
    verb, *said = words
    text = tmp_path / "ids.jsonl"
    text.write_text('{"input_ids": [5, 6, 7, 8]}\n' * 4)
    more = ["--calibrate", text] if verb == "merge" else []
    source = models("qwen3" if verb == "upcycle" else "mixtral")
    done = moetool(verb, source, tmp_path / "out", *said, *more)
    assert done.returncode == 2 and said[0] in done.stderr and "next:" in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["ids.jsonl"]


def test_every_declared_partner_is_tried_here() -> None:
    declared = {f.name for group in (Common, Text, Gate, Solving) for f in fields(group) if f.needs}
    assert declared == set(ALONE)
    known = {f.name for name in methods.METHODS for f in methods.load(name).fields()}
    known |= {f.name for f in fields(Common)}
    for group in (Common, Text, Gate, Solving):
        for field in fields(group):
            assert {n.partition("=")[0] for n in field.needs} <= known
