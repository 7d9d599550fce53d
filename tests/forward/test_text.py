"""Text comes in every form people have, and every broken file gets a sentence with its name and
line.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moetool
from moetool.demo import MODEL, TEXT
from moetool.forward import batches as batching
from moetool.forward import documents, text
from moetool.forward.batches import Cut


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


GOOD = [{"text": f"Document {i} speaks of the light."} for i in range(20)]


def test_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    lines(
        tmp_path / "a.jsonl",
        [
            *GOOD,
            "",
            {"content": "other field"},
            {"messages": [{"role": "user", "content": "hi"}]},
            {"input_ids": [1, 2, 3]},
        ],
    )
    (tmp_path / "b.txt").write_text("plain\ntext", encoding="utf-8-sig")
    parquet.write_table(arrow.table({"text": ["one", "two", None]}), tmp_path / "c.parquet")
    a, b, c = text.read([str(tmp_path / n) for n in ("a.jsonl", "b.txt", "c.parquet")])
    assert (
        len(a.documents) == 23
        and a.documents[-1].ids == (1, 2, 3)
        and a.documents[-2].messages
        and a.documents[20].text == "other field"
    )
    assert b.documents[0].text == "plain\ntext" and [d.text for d in c.documents] == ["one", "two"]
    for said, count in ((b'{"text": "x"}\n{"text": "y"}\n', 2), (b"just words", 1)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said)))
        text.stdin.cache_clear()
        assert (
            len(text.read(["-"])[0].documents) == count == len(text.read(["-"])[0].documents)
        )  # read once, used twice
    own = lines(tmp_path / "own.jsonl", [{"body": "mine", "text": "not this"}])
    assert text.read([str(own)], field="body")[0].documents[0].text == "mine"


def test_shares(tmp_path: Path) -> None:
    for name in "abc":
        lines(tmp_path / f"{name}.jsonl", GOOD)

    def read(*specs: str) -> list[float]:
        return [round(c.share, 3) for c in text.read([str(tmp_path / s) for s in specs])]

    assert read("a.jsonl", "b.jsonl:0.3") == [0.7, 0.3]
    assert read("a.jsonl", "b.jsonl") == [0.5, 0.5]
    assert read("a.jsonl:3", "b.jsonl:1") == [0.75, 0.25]
    with pytest.raises(moetool.UsageError, match="leave nothing"):
        read("a.jsonl:0.8", "b.jsonl:0.4", "c.jsonl")
    with pytest.raises(moetool.UsageError, match="not positive"):
        read("a.jsonl:0")
    with pytest.raises(moetool.UsageError, match="no text given"):
        text.read([])


def bad_files(folder: Path) -> dict[str, tuple[Path, str, str]]:
    """name -> (file, what is said, where)."""
    made = {
        "empty": (folder / "empty.jsonl", "no text here", "empty.jsonl"),
        "blank": (folder / "blank.txt", "no text here", "blank.txt"),
        "latin": (folder / "latin.jsonl", "not UTF-8", "latin.jsonl:2"),
        "latin-txt": (folder / "latin.txt", "not UTF-8", "latin.txt:3"),
        "folder": (folder / "folder", "a folder", "folder"),
        "missing": (folder / "nothing.jsonl", "no such file", "nothing.jsonl"),
        "line17": (folder / "line17.jsonl", "not JSON", "line17.jsonl:17"),
        "no-field": (folder / "field.jsonl", "no text field", "field.jsonl:2"),
        "not-object": (folder / "list.jsonl", "not a JSON object", "list.jsonl:1"),
        "number": (folder / "number.jsonl", "holds no text", "number.jsonl:1"),
        "broken-parquet": (folder / "broken.parquet", "not a whole parquet", "broken.parquet"),
        "column": (folder / "column.parquet", "no text column", "column.parquet"),
        "deep": (folder / "deep.jsonl", "not JSON", "deep.jsonl:1"),
        "huge": (folder / "huge.jsonl", "too long", "huge.jsonl:2"),
    }
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    made["empty"][0].write_text("")
    made["blank"][0].write_text(" \n\n")
    made["latin"][0].write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    made["latin-txt"][0].write_bytes(b"one\ntwo\ncaf\xe9\n")
    made["folder"][0].mkdir()
    lines(made["line17"][0], [*GOOD[:16], "{'text': 'single quotes'}"])
    lines(made["no-field"][0], [{"text": "a"}, {"question": "b", "answer": "c"}])
    lines(made["not-object"][0], ["[1, 2]"])
    lines(made["number"][0], [{"text": 5}])
    made["broken-parquet"][0].write_bytes(b"PAR1 nothing")
    parquet.write_table(arrow.table({"question": ["a"]}), made["column"][0])
    made["deep"][0].write_text("[" * 200_000 + "\n")
    with made["huge"][0].open("wb") as out:
        out.write(b'{"text": "a"}\n')
        out.truncate(documents.MAX_LINE + 100)
    return made


BAD = (
    "empty",
    "blank",
    "latin",
    "latin-txt",
    "folder",
    "missing",
    "line17",
    "no-field",
    "not-object",
    "number",
    "broken-parquet",
    "column",
    "deep",
    "huge",
)


@pytest.mark.parametrize("name", BAD)
def test_bad_files_get_a_sentence(name: str, tmp_path: Path) -> None:
    path, said, where = bad_files(tmp_path)[name]
    with pytest.raises(moetool.MoetoolError, match=said) as refused:
        text.read([str(path)])
    assert where in str(refused.value) and refused.value.hint


def test_the_command_says_it_before_work(
    models: Callable[..., Path], tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    path, said, where = bad_files(tmp_path)["line17"]
    done = moetool("prune", models("mixtral"), tmp_path / "out", "--calibrate", path)
    assert (
        done.returncode == 1
        and said in done.stderr
        and where in done.stderr
        and "next:" in done.stderr
    )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_hub_datasets_are_downloaded_as_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    lines(tmp_path / "train.jsonl", GOOD)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **more: asked.update(repo=repo, **more) or str(tmp_path),
    )
    assert len(text.read(["org/data@v1"])[0].documents) == 20
    assert (
        asked["repo"] == "org/data"
        and asked["repo_type"] == "dataset"
        and asked["revision"] == "v1"
    )


def cut(corpora: list[text.Corpus], **options: Any) -> batching.Batches:
    return batching.make(corpora, MODEL, Cut(**options), vocab=512, longest=512)


def test_packing_loses_no_token_and_is_the_same_again() -> None:
    corpora = text.read([str(TEXT)])
    made = cut(corpora, tokens=10**9, seq_len=64)
    again = cut(corpora, tokens=10**9, seq_len=64)
    assert (
        made.digest == again.digest and cut(corpora, tokens=1000, seq_len=64).digest != made.digest
    )
    ids = np.concatenate([b.ids.reshape(-1)[b.valid] for b in made.batches])
    from transformers import AutoTokenizer

    assert sorted(ids.tolist()) == sorted(
        [*AutoTokenizer.from_pretrained(MODEL)(TEXT.read_text())["input_ids"], 1]
    )
    assert any("of the" in n for n in made.notes)
    assert all(b.ids.shape[1] <= 64 for b in made.batches)


def test_shares_decide_tokens_and_padding_is_not_counted(tmp_path: Path) -> None:
    a, b = lines(tmp_path / "a.jsonl", GOOD * 20), lines(tmp_path / "b.jsonl", GOOD * 20)
    made = cut(text.read([str(a), f"{b}:0.25"]), tokens=2000, seq_len=64)
    assert made.total == sum(made.tokens) == sum(x.tokens for x in made.batches)
    assert abs(made.tokens[1] / made.total - 0.25) < 0.05 and {x.file for x in made.batches} == {
        0,
        1,
    }
    single = cut(text.read([str(a)]), tokens=500, seq_len=512, pack=False, shuffle=False)
    assert all(
        len(set(x.lengths.tolist())) >= 1 and x.tokens == x.valid.sum() for x in single.batches
    )


def test_seq_len_and_vocabulary(tmp_path: Path) -> None:
    made = cut(text.read([str(TEXT)]), tokens=2000, seq_len=4096)
    assert made.seq_len == 512 and any("512 tokens" in n for n in made.notes)
    ids = lines(tmp_path / "ids.jsonl", [{"input_ids": [1, 2, 700]}])
    with pytest.raises(moetool.MoetoolError, match="outside the model's vocabulary"):
        cut(text.read([str(ids)]))


def test_a_model_without_tokenizer_takes_ids(models: Callable[..., Path], tmp_path: Path) -> None:
    folder = models("mixtral")
    with pytest.raises(moetool.MoetoolError, match="no tokenizer"):
        batching.make(text.read([str(TEXT)]), folder, Cut(), vocab=160, longest=None)
    ids = lines(tmp_path / "ids.jsonl", [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    made = batching.make(
        text.read([str(ids)]), folder, Cut(pack=False, shuffle=False), vocab=160, longest=None
    )
    assert made.total == 5
