"""Random token ids stand in for text: the same ones for a seed, none of them special, and as many
as were asked for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetool.demo import MODEL, TEXT
from moetool.errors import MoetoolError
from moetool.forward import drawn, stock, text
from moetool.forward.batches import Batches, Cut
from moetool.forward.profile import Calibration
from moetool.surgery.checkpoint import Checkpoint


def read(*specs: str, **cut: Any) -> Batches:
    told = {"tokens": 4000, "seq_len": 128} | cut
    return Calibration(specs, Cut(**told)).read(Checkpoint.open(MODEL))


def ids(found: Batches, file: int = 0) -> np.ndarray:
    rows = [b.ids.reshape(-1)[b.valid] for b in found.batches if b.file == file]
    return np.concatenate(rows)


def test_the_same_ids_for_a_seed_and_others_for_another() -> None:
    first = read("random")
    assert first.total == 4000 and first.files == ("random",) and first.notes == ()
    assert first.described == [{"name": "random", "tokens": 4000, "drawn": "random"}]
    assert read("random").digest == first.digest != read("random", seed=1).digest
    more = [b.ids[:31] for b in read("random", tokens=8000, batch_tokens=1 << 20).batches]
    less = [b.ids[:31] for b in read("random", batch_tokens=1 << 20).batches]
    assert (more[0] == less[0]).all(), "more tokens begin with the same ones"


def test_no_special_token_is_drawn() -> None:
    known = stock.tokenizer(MODEL)
    special = set(known.all_special_ids) | set(known.get_added_vocab().values())
    seen = set(ids(read("random", tokens=20_000)).tolist())
    assert special and not seen & special and max(seen) < len(known)
    assert len(seen) > 0.9 * len(known), "and most others are"


def folder(at: Path, tokenizer: object = None) -> Path:
    at.mkdir()
    if tokenizer is not None:
        (at / "tokenizer.json").write_text(json.dumps(tokenizer))
    return at


def test_what_may_be_drawn(tmp_path: Path) -> None:
    """Rows of the embedding beyond the tokenizer are nobody's; without one the config speaks."""
    config = {"eos_token_id": [3, 4], "bos_token_id": 1, "text_config": {"image_token_id": 5}}
    vocab = {f"t{n}": n for n in range(10)}
    words = {"model": {"vocab": vocab}, "added_tokens": [{"id": 0}, {"id": 9}, {"id": 10}]}

    def allowed(tokenizer: object, rows: int = 16, config: Any = config) -> list[int]:
        nth = len(list(tmp_path.iterdir()))
        found = drawn.of(folder(tmp_path / str(nth), tokenizer), config, rows)
        assert found.ids is not None
        return found.ids.tolist()

    assert allowed(words) == [2, 6, 7, 8]
    assert allowed(words, rows=8) == [2, 6, 7]
    listed = {"model": {"vocab": [[f"t{n}", -float(n)] for n in range(7)]}}
    assert allowed(listed, config={}) == list(range(7))
    assert allowed(listed) == [0, 2, 6]
    assert allowed(None, rows=8) == [0, 2, 6, 7]
    assert allowed(None, rows=3, config={"pad_token_id": None}) == [0, 1, 2]
    with pytest.raises(MoetoolError, match="not special"):
        allowed(None, rows=2, config={"pad_token_id": 0, "eos_token_id": 1})


def test_frequent_tokens_are_drawn_more_often(tmp_path: Path) -> None:
    """By Zipf's law over the order of ids, or by the probabilities that a unigram model keeps."""
    many = ids(read("random", tokens=50_000))
    first = drawn.of(MODEL, {}, 512).ids
    assert first is not None
    share = [(many == first[rank]).mean() for rank in (0, 10, 90, 400)]
    law = [1 / (rank + drawn.SHIFT) for rank in (0, 10, 90, 400)]
    whole = sum(1 / (rank + drawn.SHIFT) for rank in range(len(first)))
    assert share == pytest.approx([one / whole for one in law], abs=0.002)
    scores = [[f"t{n}", s] for n, s in enumerate((-3.0, -1.0, -2.0))]
    found = drawn.of(folder(tmp_path / "unigram", {"model": {"vocab": scores}}), {}, 3)
    (row,) = found.rows(30_000, 30_000, seed=0)
    counts = np.bincount(row, minlength=3) / len(row)
    wanted = np.exp([-3.0, -1.0, -2.0])
    assert counts == pytest.approx(wanted / wanted.sum(), abs=0.01)


def test_another_tokenizer_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        all_special_ids = (0,)

        def __len__(self) -> int:
            return 6

        def get_added_vocab(self) -> dict[str, int]:
            return {"<x>": 5}

    monkeypatch.setattr(stock, "tokenizer", lambda *_, **__: Words())
    found = drawn.of(tmp_path, {}, 100)
    assert found.ids is not None and found.ids.tolist() == [1, 2, 3, 4]


def test_a_share_of_what_the_text_gives(tmp_path: Path) -> None:
    found = read(str(TEXT), "random:0.2", tokens=1000)
    assert found.tokens == (800, 200)
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"input_ids": list(range(1, 81))}))
    found = read(str(short), "random:0.2", tokens=100_000)
    assert found.tokens == (80, 20), "not of what the text should have given"
    assert "gave 80 of the 80,000" in found.notes[0] and len(found.notes) == 1
    assert [f.get("drawn", "") for f in found.described] == ["", "random"]
    assert read("random:0.5", str(short), tokens=160).tokens == (80, 80)


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert drawn.means("random") and drawn.means("random:0.25") and not drawn.means("random.txt")
    Path("random").write_text("words of mine")
    assert not drawn.means("random") and not drawn.means("random:0.25")
    (corpus,) = text.read(["random"])
    assert isinstance(corpus.documents, tuple) and corpus.documents[0].text == "words of mine"


def test_neither_torch_nor_transformers_is_needed() -> None:
    code = (
        "import sys; from moetool.forward import drawn; "
        f"found = drawn.of({str(MODEL)!r}, {{}}, 512); rows = list(found.rows(100, 32, 0)); "
        "assert [len(r) for r in rows] == [32, 32, 32, 4]; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_the_cut_holds_for_random_ids_too() -> None:
    found = read("random", tokens=300, pack=False)
    lengths = np.concatenate([b.lengths for b in found.batches])
    assert sorted(lengths.tolist()) == [44, 128, 128] and found.total == 300
    assert read(str(TEXT), tokens=64).drawn == ("",)
