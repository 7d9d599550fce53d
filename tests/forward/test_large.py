"""Text that is too large to hold is read as it is wanted, in the order that it has when it is held."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Done

import moetool
from moetool.demo import MODEL
from moetool.forward import batches as batching
from moetool.forward import large, text
from moetool.forward.batches import Cut
from moetool.forward.large import Large

ROWS = [{"text": f"Document {i} speaks of the light, and of {i * i}."} for i in range(200)]


def jsonl(folder: Path) -> Path:
    lines = [json.dumps(row) + "\n" for row in ROWS]
    lines[7:7] = ["\n", "  \n"]
    (folder / "a.jsonl").write_text("".join(lines))
    return folder / "a.jsonl"


def plain(folder: Path) -> Path:
    (folder / "a.txt").write_text("\n".join(row["text"] for row in ROWS) + "\n", "utf-8-sig")
    return folder / "a.txt"


def table(folder: Path) -> Path:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=20)
    return folder / "a.parquet"


def cut(path: str, **options: Any) -> batching.Batches:
    return batching.make(text.read([path]), MODEL, Cut(**options), vocab=512, longest=512)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def shrink() -> None:
        monkeypatch.setattr(large, "HELD", 0)
        monkeypatch.setattr(large, "PIECE", 100)

    return shrink


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"pack": False}, {"tokens": 300}])
def test_lines_have_the_order_that_they_have_when_all_are_held(
    options: dict[str, Any], tmp_path: Path, tiny: Callable[[], None]
) -> None:
    path = str(jsonl(tmp_path))
    held = cut(path, seq_len=32, **options)
    tiny()
    assert isinstance(text.read([path])[0].documents, Large)
    assert cut(path, seq_len=32, **options).digest == held.digest


def test_long_texts_are_one_document_in_pieces(tmp_path: Path, tiny: Callable[[], None]) -> None:
    path = str(plain(tmp_path))
    (held,) = text.read([path])[0].order(0)
    tiny()
    pieces = list(text.read([path])[0].order(0))
    assert "".join(d.text or "" for d in pieces) == held.text and len(pieces) > 50
    assert [d.more for d in pieces] == [True] * (len(pieces) - 1) + [False]
    made = cut(path, seq_len=16, pack=False)
    assert made.total == 16  # one document, one sequence


def test_pieces_break_no_character(tmp_path: Path, tiny: Callable[[], None]) -> None:
    (tmp_path / "a.txt").write_text("äöü€😀" * 500)
    tiny()
    pieces = list(text.read([str(tmp_path / "a.txt")])[0].order(None))
    assert "".join(d.text or "" for d in pieces) == "äöü€😀" * 500 and len(pieces) > 10


def test_rows_come_by_row_groups(tmp_path: Path, tiny: Callable[[], None]) -> None:
    tiny()
    corpus = text.read([str(table(tmp_path))])[0]
    assert [d.text for d in corpus.order(None)] == [r["text"] for r in ROWS]
    drawn = [d.text for d in corpus.order(3)]
    assert drawn != [r["text"] for r in ROWS] and sorted(map(str, drawn)) == sorted(
        r["text"] for r in ROWS
    )


def test_of_very_many_lines_a_part_stands_for_all(
    tmp_path: Path, tiny: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny()
    monkeypatch.setattr(large, "MOST", 32)
    found = [d.text for d in text.read([str(jsonl(tmp_path))])[0].order(None)]
    assert found == [r["text"] for r in ROWS[::8]]


def test_a_wrong_line_is_named_when_its_turn_comes(
    tmp_path: Path, tiny: Callable[[], None]
) -> None:
    path = jsonl(tmp_path)
    with path.open("a") as out:
        out.write("not JSON\n")
    tiny()
    with pytest.raises(moetool.MoetoolError, match="not JSON") as caught:
        cut(str(path), seq_len=32)
    assert f"{path}:203" in str(caught.value)


def test_long_standard_input_goes_through_a_file(
    tiny: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny()
    data = "".join(json.dumps(r) + "\n" for r in ROWS).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    text.stdin.cache_clear()
    for _ in range(2):
        assert [d.text for d in text.read(["-"])[0].order(None)] == [r["text"] for r in ROWS]
    text.stdin.cache_clear()


PEAK = """
import resource, sys
from moetool.forward import batches, text
from moetool.demo import MODEL
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
batches.make(text.read(["demo"]), MODEL, batches.Cut(tokens=2000), vocab=512, longest=512)
before = peak()
made = batches.make(text.read([sys.argv[1]]), MODEL, batches.Cut(tokens=20_000), vocab=512, longest=512)
assert made.total > 18_000
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet", "stdin"])
def test_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path) -> None:
    """96 MiB of text, of which 20,000 tokens are wanted."""
    row = json.dumps({"text": "The light of the morning lay on the water. " * 24}) + "\n"
    count = (96 << 20) // len(row)
    path = tmp_path / f"a.{'jsonl' if kind == 'stdin' else kind}"
    if kind == "parquet":
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        rows = arrow.table({"text": [f"{i} " + row for i in range(count)]})
        parquet.write_table(rows, path, compression="none", use_dictionary=False)
    else:
        with path.open("w") as out:
            out.writelines([row] * count)
    with path.open("rb") as handle:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PEAK, "-" if kind == "stdin" else str(path)],
            stdin=handle,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 48 << 20, f"{int(done.stdout):,}"


def test_named_pipes_are_refused(tmp_path: Path, moetool: Callable[..., Done]) -> None:
    import os

    os.mkfifo(tmp_path / "a.jsonl")
    done = moetool("eval", "demo", "--text", tmp_path / "a.jsonl")
    assert done.returncode == 1 and "a named pipe" in done.stderr, done.stderr
