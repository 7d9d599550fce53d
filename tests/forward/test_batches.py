"""Token ids become batches: nothing lost, nothing counted twice, padding never counted."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from moetool.errors import MoetoolError
from moetool.forward import batches as batching
from moetool.forward.batches import Batches, Cut
from moetool.forward.documents import Document
from moetool.forward.text import Corpus

VOCAB = 1000


def corpus(*lengths: int, name: str = "a", share: float = 1.0) -> Corpus:
    """Documents of token ids 1, 2, 3, ... that run on from one document to the next."""
    documents, first = [], 1
    for number, length in enumerate(lengths):
        documents.append(Document(f"{name}:{number}", ids=tuple(range(first, first + length))))
        first += length
    return Corpus(name, share, tuple(documents))


def made(*corpora: Corpus, longest: int | None = None, **cut: object) -> Batches:
    plain = {"shuffle": False, "tokens": 10**6, "seq_len": 8, "batch_tokens": 16, **cut}
    return batching.make(corpora, Path("."), Cut(**plain), vocab=VOCAB, longest=longest)  # type: ignore[arg-type]


def sequences(found: Batches, file: int = 0) -> list[list[int]]:
    """The real tokens of each sequence, in the order of their first id."""
    rows = []
    for batch in found.batches:
        if batch.file == file:
            rows += [
                row[:n].tolist() for row, n in zip(batch.ids, batch.lengths.tolist(), strict=True)
            ]
    return sorted(rows)


@pytest.mark.parametrize("lengths", [(20,), (3, 3, 3), (8, 8), (1, 30, 2), (7,)])
def test_packing_runs_through_documents(lengths: tuple[int, ...]) -> None:
    found = made(corpus(*lengths))
    rows = sequences(found)
    assert list(chain.from_iterable(rows)) == list(range(1, sum(lengths) + 1))[: found.total]
    assert all(len(r) == 8 for r in rows[:-1])
    lost = sum(lengths) - found.total
    assert lost == (sum(lengths) % 8 == 1), "a single token has nothing to predict"


def test_without_packing_each_document_is_a_sequence() -> None:
    found = made(corpus(5, 1, 20, 8), pack=False)
    assert [len(r) for r in sequences(found)] == [5, 8, 8]
    assert sequences(found)[1][0] == 7, "cut off at the end, not at the front"


@pytest.mark.parametrize("wanted", [1, 2, 8, 9, 16, 17, 30])
@pytest.mark.parametrize("pack", [True, False])
def test_no_more_tokens_than_asked_for(pack: bool, wanted: int) -> None:
    if wanted == 1:
        with pytest.raises(MoetoolError, match="no tokens"):
            made(corpus(10, 10, 10, 10), tokens=wanted, pack=pack)
        return
    found = made(corpus(10, 10, 10, 10), tokens=wanted, pack=pack)
    assert wanted - 1 <= found.total <= wanted
    assert found.tokens == (found.total,)


def test_padding_repeats_a_token_and_is_marked() -> None:
    found = made(corpus(3, 6, 2), pack=False)
    for batch in found.batches:
        valid = batch.valid.reshape(batch.ids.shape)
        assert batch.tokens == valid.sum() == batch.lengths.sum()
        for row, real, n in zip(batch.ids, valid, batch.lengths.tolist(), strict=True):
            assert real.tolist() == [i < n for i in range(len(row))]
            assert set(row[n:].tolist()) <= {row[n - 1]}
    assert found.total == 11


@pytest.mark.parametrize("batch_tokens", [1, 8, 17, 64])
def test_batches_hold_what_fits_and_likes_together(batch_tokens: int) -> None:
    found = made(corpus(2, 8, 3, 8, 5, 8, 2), pack=False, batch_tokens=batch_tokens)
    size = max(1, batch_tokens // 8)
    assert all(len(b.ids) <= size for b in found.batches)
    longest = [b.ids.shape[1] for b in found.batches]
    assert longest == sorted(longest, reverse=True)
    assert sum(len(b.ids) for b in found.batches) == 7


def test_shares_divide_the_tokens() -> None:
    found = made(corpus(500, name="a", share=0.75), corpus(500, name="b", share=0.25), tokens=160)
    assert found.tokens == (120, 40) and found.files == ("a", "b")
    assert {b.file for b in found.batches} == {0, 1}


def test_too_little_text_is_said() -> None:
    found = made(corpus(50), tokens=100)
    (note,) = found.notes
    assert "a gave 50 of the 100 tokens wanted" in note
    assert made(corpus(95), tokens=100).notes == ()


def test_longer_than_the_model_is_lowered_and_said() -> None:
    found = made(corpus(40), longest=4)
    assert found.seq_len == 4 and "--seq-len 8" in found.notes[0] and "4" in found.notes[0]
    assert max(b.ids.shape[1] for b in found.batches) == 4
    assert made(corpus(40), longest=8, tokens=40).notes == ()


def test_ids_beyond_the_vocabulary() -> None:
    fine = Corpus("a", 1.0, (Document("a:1", ids=(VOCAB - 1, 0)),))
    assert made(fine).total == 2
    wrong = Corpus("a", 1.0, (Document("a:1", ids=(VOCAB, 0)),))
    with pytest.raises(MoetoolError, match="outside the model's vocabulary") as refused:
        made(wrong)
    assert refused.value.where["found"] == str(VOCAB)


def test_the_digest_names_the_ids_and_their_files() -> None:
    a = made(corpus(30))
    assert made(corpus(30)).digest == a.digest == made(corpus(30), batch_tokens=8).digest
    assert made(corpus(31)).digest != a.digest
    assert made(corpus(30), seq_len=4).digest != a.digest
    two = made(corpus(30), corpus(30, name="b"), tokens=30)
    assert two.digest != a.digest


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffling_deals_documents_by_seed(seed: int) -> None:
    lengths = (8,) * 12
    first = made(corpus(*lengths), shuffle=True, seed=seed)
    again = made(corpus(*lengths), shuffle=True, seed=seed)
    other = made(corpus(*lengths), shuffle=True, seed=seed + 7)
    assert first.digest == again.digest != other.digest
    assert sequences(first) == sequences(other), "the same documents"
    few = made(corpus(*lengths), shuffle=True, seed=seed, tokens=16)
    assert sequences(few) != sequences(made(corpus(*lengths), tokens=16))


def test_ids_are_int64_whatever_they_were() -> None:
    found = made(corpus(20))
    assert all(b.ids.dtype == np.int64 and b.lengths.dtype == np.int64 for b in found.batches)
