"""Some sequences of every file are left out of a refit, to measure it on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moetool.forward.batches import Batch, Batches
from moetool.methods.reduce.left_out import EVERY, Parts


def batch(file: int, *lengths: int) -> Batch:
    return Batch(np.zeros((len(lengths), 9), np.int64), np.array(lengths), file)


def test_every_eighth_sequence_of_each_file() -> None:
    made = Batches(
        (batch(0, *[5] * 8), batch(0, *[3] * 8), batch(1, 2, 2, 2), batch(2, *[4] * 6)),
        ("a", "b", "own"),
        (64, 6, 24),
        9,
        "",
        drawn=("", "", "own"),
    )
    parts = Parts.of(made)
    assert len(parts.fit) == made.total and set(parts.out) == {"text", "own"}
    text, own = parts.out["text"], parts.out["own"]
    assert torch.equal(
        torch.nonzero(text).flatten(), torch.tensor([20, 21, 22, 23, 24, 52, 53, 54])
    )
    assert own.sum() == 4 and own[70 + 16 : 70 + 20].all(), "few sequences: one of six"
    assert torch.equal(parts.fit, ~(text | own))
    assert not parts.out["text"][64:70].any(), "three sequences are solved on whole"


@pytest.mark.parametrize("drawn", [(), ("",)])
def test_a_short_text_is_solved_on_whole(drawn: tuple[str, ...]) -> None:
    made = Batches((batch(0, *[5] * (EVERY // 2)),), ("a",), (20,), 9, "", drawn=drawn)
    parts = Parts.of(made)
    assert parts.fit.all() and parts.out == {}
