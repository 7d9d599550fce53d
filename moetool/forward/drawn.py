"""Token ids drawn from a seed: calibration where there is no text, or a share of it.

`random` stands among the names of files, `random:0.2` is a share; so does `own`, what the model
writes itself (forward/own.py), which begins with such ids. Nothing here needs torch, a
network or a tokenizer that loads: what special tokens there are is read from tokenizer.json where
it lies beside the weights, else a tokenizer is asked, else the config.

Ids are drawn as words are used, by Zipf's law: a tokenizer numbers its tokens in the order in which
training made them, frequent ones first, and ids that no text uses lead a model where no text does.
One that keeps the probability of each token (a unigram model) is drawn from by those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moetool import strict_json
from moetool.data import JsonMapping
from moetool.errors import MoetoolError

if TYPE_CHECKING:
    import numpy as np

RANDOM, OWN = "random", "own"
SHIFT = (
    10.0  # ranks by which Zipf's law is shifted (Mandelbrot), so that the first are no text alone
)
_SPEC = re.compile(rf"({RANDOM}|{OWN})(?::\d*\.?\d+)?")
_SPECIAL = re.compile(r"\w*(token_ids?|token_index)")


def means(spec: str) -> str:
    """RANDOM or OWN where a `--calibrate` asks for them, else nothing; a file of that name comes
    first.
    """
    found = _SPEC.fullmatch(spec)
    return found[1] if found and not Path(spec).exists() and not Path(found[1]).exists() else ""


@dataclass(frozen=True)
class Drawn:
    """Stands where documents would. `ids` [count] may be drawn, each with its `weight` [count];
    None until the model is known.
    """

    name: str = RANDOM
    ids: np.ndarray | None = field(default=None, repr=False)
    weight: np.ndarray | None = field(default=None, repr=False)

    def rows(self, tokens: int, length: int, seed: int) -> Iterator[np.ndarray]:
        """Sequences of `length` that hold `tokens` ids in all, the last one shorter; the first n
        are the same however many are asked for.
        """
        import numpy as np

        from moetool.kernels import draw

        assert self.ids is not None and self.weight is not None
        upto = np.cumsum(self.weight, dtype=np.float64)
        for number, start in enumerate(range(0, tokens, length)):
            count = min(length, tokens - start)
            if count < 2:
                return
            at = draw.uniform(count, seed, f"calibrate/{RANDOM}/{number}") * upto[-1]
            place = np.minimum(np.searchsorted(upto, at, side="right"), len(self.ids) - 1)
            yield self.ids[place].astype(np.int64)


def of(folder: str | Path, config: JsonMapping, rows: int, *, trusted: bool = False) -> Drawn:
    """The ids of a model with `rows` rows of its embedding: all that its tokenizer gives but the
    special and added ones.

    Raises MoetoolError where none is left.
    """
    import numpy as np

    known = _of_file(Path(folder)) or _of_tokenizer(folder, trusted) or _Known(rows, frozenset())
    special = known.special | frozenset(_numbers(config))
    ids = np.array([i for i in range(min(rows, known.count)) if i not in special], np.int64)
    if not len(ids):
        raise MoetoolError(
            "the vocabulary has no token that is not special",
            file=folder,
            expected="tokens of text",
            found=f"{rows} rows, all special",
            hint="give text or token ids: --calibrate FILE",
        )
    if known.scores:
        return Drawn(RANDOM, ids, np.exp(np.array([known.scores[i] for i in ids], np.float64)))
    return Drawn(RANDOM, ids, 1.0 / (np.arange(len(ids)) + SHIFT))


@dataclass(frozen=True)
class _Known:
    """What a tokenizer says: how many tokens of text it has at most, which are none, and their
    logarithmic probabilities, if it keeps any.
    """

    count: int
    special: frozenset[int]
    scores: tuple[float, ...] = ()


def _of_file(folder: Path) -> _Known | None:
    """tokenizer.json, read as data; None where it is not there, or holds no table of tokens."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    found = strict_json.load(path, "tokenizer")
    model = found.get("model")
    scores: tuple[float, ...] = ()
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        numbers = [n for n in vocab.values() if type(n) is int]
    elif isinstance(vocab, list):
        numbers, scores = list(range(len(vocab))), _scores(vocab)
    else:
        return None
    added = [t.get("id") for t in found.get("added_tokens") or () if isinstance(t, dict)]
    special = frozenset(i for i in added if type(i) is int)
    return _Known(max(numbers) + 1, special, scores) if numbers else None


def _scores(vocab: list[object]) -> tuple[float, ...]:
    """Of a unigram model: logarithmic probabilities of its tokens; empty where these are none."""
    found = [row[1] for row in vocab if isinstance(row, list) and len(row) == 2]
    fits = len(found) == len(vocab) and all(isinstance(s, int | float) and s <= 0 for s in found)
    return tuple(map(float, found)) if fits and min(found, default=0.0) < 0 else ()


def _of_tokenizer(folder: str | Path, trusted: bool) -> _Known | None:
    """Whatever tokenizer transformers finds here; None where there is none that loads."""
    from moetool.forward import stock

    try:
        found = stock.tokenizer(folder, trust_remote_code=trusted)
    except MoetoolError:
        return None
    added = set(found.get_added_vocab().values()) | set(found.all_special_ids)
    return _Known(len(found), frozenset(map(int, added)))


def _numbers(config: JsonMapping) -> Iterator[int]:
    """Ids that the config calls special, at any depth."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif _SPECIAL.fullmatch(name):
            values = value if isinstance(value, list) else [value]
            yield from (v for v in values if type(v) is int)
