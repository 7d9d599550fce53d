"""A part of a text that is as different as the whole."""

from __future__ import annotations

import numpy as np
import pytest

from moetool.forward.batches import PIECE, Batch, Batches


def batches(sequences: int, length: int) -> Batches:
    """Two files of sequences that differ in every token; the second with padding."""
    made, tokens = [], []
    for file in range(2):
        ids = np.arange(sequences * length).reshape(sequences, length) + 10**6 * file
        lengths = np.full(sequences, length - file)
        made += [Batch(ids[i : i + 2], lengths[i : i + 2], file) for i in range(0, sequences, 2)]
        tokens.append(int(lengths.sum()))
    return Batches(tuple(made), ("a", "b"), tuple(tokens), length, "digest")


def rows(of: Batches, file: int) -> list[np.ndarray]:
    return [b.ids[i, :n] for b in of.batches if b.file == file for i, n in enumerate(b.lengths)]


@pytest.mark.parametrize(("tokens", "sequences"), [(8 * 256, 4), (4 * 256, 4), (4 * 128, 2)])
def test_the_beginning_of_as_many_sequences_as_can_be(tokens: int, sequences: int) -> None:
    whole = batches(4, 1024)
    part = whole.spread(tokens)
    assert part.total == sum(part.tokens) == sum(b.tokens for b in part.batches)
    assert abs(part.total - tokens) <= 8 and part.digest != whole.digest
    for file in range(2):
        taken, full = rows(part, file), rows(whole, file)
        assert len(taken) == sequences and min(map(len, taken)) >= PIECE
        for piece in taken:
            (home,) = [r for r in full if r[0] == piece[0]]
            assert np.array_equal(home[: len(piece)], piece)


def test_no_more_than_there_is() -> None:
    whole = batches(4, 64)
    assert whole.spread(10**6) is whole
    tiny = whole.spread(1)
    assert [len(rows(tiny, f)) for f in range(2)] == [1, 1]
    assert sum(len(r) for r in rows(tiny, 0)) == 64  # a piece is never cut below PIECE
