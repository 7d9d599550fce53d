"""Documents -> token ids -> batches of one length each. Right padding is exact in a causal model
and never counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.forward import chat, stock
from moetool.forward.documents import Document
from moetool.forward.drawn import Drawn
from moetool.forward.text import Corpus

PIECE = 128  # tokens of a sequence, at least, where only a part of a text is taken
LONG = 256 << 10  # characters that a tokenizer is given at once: it needs 200 bytes for each


@dataclass(frozen=True)
class Batch:
    """ids [sequences, length] (int64), lengths [sequences] of real tokens; all of one file."""

    ids: np.ndarray
    lengths: np.ndarray
    file: int

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def valid(self) -> np.ndarray:
        """[sequences * length] bool: which places hold a real token."""
        return (np.arange(self.ids.shape[1])[None, :] < self.lengths[:, None]).reshape(-1)

    def rows(self) -> list[np.ndarray]:
        """Each sequence's real tokens."""
        return [self.ids[i, :n] for i, n in enumerate(self.lengths)]


@dataclass(frozen=True)
class Batches:
    """What goes through the model. `notes` are for the user; `digest` names the token ids
    themselves.
    """

    batches: tuple[Batch, ...] = field(repr=False)
    files: tuple[str, ...]
    tokens: tuple[int, ...]  # of each file
    seq_len: int
    digest: str
    notes: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()  # of each file, where one is no text: its name, or nothing
    peak: int = 0  # promised bytes of making them, where a model wrote them

    @property
    def total(self) -> int:
        return sum(self.tokens)

    @property
    def described(self) -> list[JsonObject]:
        """Files as reports name them: {name, tokens}, and `drawn` of ids that are no text."""
        drawn = self.drawn or ("",) * len(self.files)
        return [
            {"name": name, "tokens": count} | ({"drawn": kind} if kind else {})
            for name, count, kind in zip(self.files, self.tokens, drawn, strict=True)
        ]

    def spread(self, tokens: int) -> Batches:
        """About `tokens` of them, as different as they can be: the beginning of every sequence, at
        least PIECE tokens long; where those are still too many, of evenly spaced sequences of every
        file. Itself where there are no more.
        """
        share = tokens / self.total
        if share >= 1:
            return self
        batches: list[Batch] = []
        counts = []
        for number in range(len(self.files)):
            mine = [b for b in self.batches if b.file == number]
            rows = list(chain.from_iterable(b.rows() for b in mine))
            size = max(len(b.ids) * b.ids.shape[1] for b in mine) if mine else 0
            taken = _pieces(rows, share)
            counts.append(sum(len(r) for r in taken))
            batches += _group(taken, number, max(1, size // max(map(len, taken), default=1)))
        seal = hashlib.sha256(f"{self.digest} spread {tokens}".encode()).hexdigest()
        return replace(self, batches=tuple(batches), tokens=tuple(counts), digest=seal)


def joined(first: Batches, second: Batches) -> Batches:
    """Both, the files of `second` after those of `first`."""
    count = len(first.files)
    moved = tuple(replace(b, file=b.file + count) for b in second.batches)
    kinds = [made.drawn or ("",) * len(made.files) for made in (first, second)]
    seal = hashlib.sha256(f"{first.digest} {second.digest}".encode()).hexdigest()
    return Batches(
        (*first.batches, *moved),
        (*first.files, *second.files),
        (*first.tokens, *second.tokens),
        max(first.seq_len, second.seq_len),
        seal,
        tuple(dict.fromkeys((*first.notes, *second.notes))),
        (*kinds[0], *kinds[1]),
        max(first.peak, second.peak),
    )


@dataclass(frozen=True)
class Cut:
    """How text becomes sequences. `pack`: documents joined (an end-of-text token between them
    where the tokenizer has one) and cut into whole sequences; otherwise each document is one
    sequence, cut off at seq_len. `shuffle`: documents in an order drawn from `seed`.
    """

    tokens: int = 262_144
    seq_len: int = 2048
    pack: bool = True
    shuffle: bool = True
    seed: int = 0
    batch_tokens: int = 4096


def make(
    corpora: Sequence[Corpus],
    model: str | Path,
    cut: Cut,
    *,
    vocab: int,
    longest: int | None,
    trusted: bool = False,
) -> Batches:
    """Tokenise with the model's own tokenizer and cut. `longest`: positions the model has; a
    longer seq_len is lowered, and said. `trusted`: code that comes with the model may run.

    Raises MoetoolError when there is no tokenizer for text, an id is outside the vocabulary, or
    nothing remains.
    """
    notes, seq_len = [], cut.seq_len
    if longest and seq_len > longest:
        notes.append(
            f"sequences have {longest} tokens, the most that this model takes, not --seq-len "
            f"{seq_len}; give --seq-len {longest} or less to choose"
        )
        seq_len = longest
    words = _Words(Path(model), trusted)
    batches: list[Batch] = []
    counts, seal = [], hashlib.sha256()
    taken = _taken(corpora, words, cut, seq_len)
    for number, (corpus, rows) in enumerate(zip(corpora, taken, strict=True)):
        for row in rows:
            _check_ids(row, corpus, vocab)
            seal.update(number.to_bytes(4, "little") + row.astype("<i4").tobytes())
        counts.append(sum(len(r) for r in rows))
        wanted = _wanted(corpus, cut)
        if counts[-1] < 0.9 * wanted and not isinstance(corpus.documents, Drawn):
            notes.append(f"{corpus.name} gave {counts[-1]:,} of the {wanted:,} tokens wanted")
        batches += _group(rows, number, max(1, cut.batch_tokens // seq_len))
    if not sum(counts):
        raise _nothing(corpora)
    return Batches(
        tuple(batches),
        tuple(c.name for c in corpora),
        tuple(counts),
        seq_len,
        seal.hexdigest(),
        (*words.notes, *notes),
        tuple(c.documents.name if isinstance(c.documents, Drawn) else "" for c in corpora),
    )


def _pieces(rows: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
    """About this share of the tokens of all sequences; at least one piece."""
    lengths = [min(len(r), max(PIECE, round(share * len(r)))) for r in rows]
    wanted = share * sum(len(r) for r in rows)
    few = max(1, min(len(rows), round(len(rows) * wanted / max(1, sum(lengths)))))
    places = [(2 * i + 1) * len(rows) // (2 * few) for i in range(few)] if rows else []
    return [rows[i][: lengths[i]] for i in places]


def _wanted(corpus: Corpus, cut: Cut) -> int:
    return max(1, round(cut.tokens * corpus.share))


def _taken(
    corpora: Sequence[Corpus], words: _Words, cut: Cut, seq_len: int
) -> list[list[np.ndarray]]:
    """The sequences of each corpus. Random ids without end are as many as keep their share beside
    what the texts gave.
    """
    texts = {n: c for n, c in enumerate(corpora) if not isinstance(c.documents, Drawn)}
    read = {n: list(_sequences(c, words, cut, seq_len, _wanted(c, cut))) for n, c in texts.items()}
    gave = sum(len(row) for row in chain.from_iterable(read.values()))
    asked = sum(_wanted(c, cut) for c in texts.values())
    part = gave / asked if asked else 1.0
    for n, corpus in enumerate(corpora):
        if isinstance(corpus.documents, Drawn):
            count = round(part * _wanted(corpus, cut))
            read[n] = list(corpus.documents.rows(count, seq_len, cut.seed))
    return [read[n] for n in range(len(corpora))]


def _nothing(corpora: Sequence[Corpus]) -> MoetoolError:
    return MoetoolError(
        "the text gave no tokens",
        file=", ".join(c.name for c in corpora),
        expected="at least two tokens",
        found=0,
        hint="give more text",
    )


def _check_ids(row: np.ndarray, corpus: Corpus, vocab: int) -> None:
    if int(row.max()) >= vocab:
        raise MoetoolError(
            "a token id is outside the model's vocabulary",
            file=corpus.name,
            expected=f"below {vocab}",
            found=int(row.max()),
            hint="the ids were made with another tokenizer",
        )


def _sequences(
    corpus: Corpus, words: _Words, cut: Cut, seq_len: int, wanted: int
) -> Iterator[np.ndarray]:
    left, rest, goes_on = wanted, np.empty(0, np.int64), False
    for document in corpus.order(cut.seed if cut.shuffle else None):
        first, goes_on = not goes_on, document.more
        if not cut.pack and not first:
            continue  # a sequence is the beginning of a document
        ids = words.ids(document, left)
        if not cut.pack:
            row = ids[: min(seq_len, left)]
            if len(row) > 1:
                yield row
                left -= len(row)
            if left < 2:
                return
            continue
        rest = np.concatenate([rest, ids, *([] if document.more else [words.between])])
        while len(rest) >= seq_len and left >= seq_len:
            yield rest[:seq_len]
            rest, left = rest[seq_len:], left - seq_len
        if left < seq_len and len(rest) >= left:
            break
    tail = rest[: min(left, seq_len)]
    if cut.pack and len(tail) > 1:
        yield tail


def _group(rows: list[np.ndarray], file: int, size: int) -> Iterator[Batch]:
    """Sequences of like length together, padded on the right with their own last token."""
    ordered = sorted(rows, key=len, reverse=True)
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        length = len(part[0])
        ids = np.stack([np.concatenate([r, np.full(length - len(r), r[-1])]) for r in part]).astype(
            np.int64
        )
        yield Batch(ids, np.array([len(r) for r in part], np.int64), file)


class _Words:
    """The model's tokenizer, loaded when the first text comes."""

    def __init__(self, folder: Path, trusted: bool) -> None:
        self._folder, self._trusted = folder, trusted
        self._tokenizer: Any = None
        self.between = np.empty(0, np.int64)

    def ids(self, document: Document, wanted: int) -> np.ndarray:
        """Token ids [tokens] of a document, of a long one at least the `wanted` first."""
        if document.ids is not None:
            return np.array(document.ids, np.int64)
        tokenizer = self._load()
        if document.messages is not None:
            return np.array(chat.ids(tokenizer, document), np.int64)
        text = document.text or ""
        found: list[int] = []
        for start in range(0, len(text), LONG):
            more = tokenizer(
                text[start : start + LONG], add_special_tokens=not start, verbose=False
            )
            found += more["input_ids"]
            if len(found) >= wanted:
                break
        return np.array(found, np.int64)

    @property
    def notes(self) -> list[str]:
        """That the model's own code was let in, where a tokenizer was needed."""
        if self._tokenizer is None or not self._trusted:
            return []
        return [f"--trust-remote-code: code of {self._folder} may have run for its tokenizer"]

    def _load(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = stock.tokenizer(self._folder, trust_remote_code=self._trusted)
            ends = self._tokenizer.eos_token_id
            self.between = np.array([ends] if isinstance(ends, int) else [], np.int64)
        return self._tokenizer
