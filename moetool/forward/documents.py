"""What stands in a file of text: documents, each with the file and line that it comes from.

Whatever is wrong with a file is said with its name and line. Nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.reading import check_regular, opened

MAX_LINE = 64 << 20
ROWS = 256  # of a .parquet file held at once
FIELDS = ("text", "content", "input_ids", "messages")
LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Document:
    """One text, or the token ids somebody made of it, or a chat; `where` is file:line. `more`: the
    text is long, and goes on in the document after this.
    """

    where: str
    text: str | None = None
    ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, str], ...] | None = None
    more: bool = False


def of_file(path: Path, field: str) -> Iterator[Document]:
    """All documents of a file. Raises MoetoolError naming file and line for anything unreadable."""
    try:
        check_regular(path, "text")
        if path.suffix == ".parquet":
            yield from _parquet(path, field)
            return
        with opened(path, "text") as handle:
            if path.suffix in LINES:
                yield from jsonl(str(path), lines(path, handle), field)
            else:
                yield from plain(str(path), handle.read())
    except OSError as problem:
        raise unreadable(path, problem) from None


def unreadable(path: Path, problem: OSError) -> MoetoolError:
    """What is said of a file that the system does not give."""
    return MoetoolError(
        f"cannot read the text: {problem.strerror or problem}",
        file=path,
        hint="check the path and its permissions",
    )


def lines(path: Path, handle: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; MoetoolError for one that is too long to be a document."""
    number = 0
    while line := handle.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise MoetoolError(
                "a line is too long to be one document",
                file=f"{path}:{number}",
                expected=f"at most {MAX_LINE >> 20} MiB",
                found="more",
                hint="split it: one document a line",
            )
        yield line


def plain(name: str, data: bytes, line: int = 1) -> Iterator[Document]:
    """The document that is all of `data`; `line` is its first one's number."""
    text = _decoded(data, name, line)
    if text.strip():
        yield Document(name, text)


def _decoded(data: bytes, name: str, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as problem:
        at = line + data[: problem.start].count(b"\n")
        raise MoetoolError(
            "the text is not UTF-8",
            file=f"{name}:{at}",
            expected="UTF-8",
            found=f"byte 0x{data[problem.start]:02x}",
            hint=f"convert it: iconv -f LATIN1 -t UTF-8 {name} > new, or give the right file",
        ) from None


def jsonl(name: str, lines: Iterable[bytes], field: str) -> Iterator[Document]:
    """A document a line."""
    for number, line in enumerate(lines, 1):
        yield from of_line(line, name, number, field)


def of_line(line: bytes, name: str, number: int, field: str) -> Iterator[Document]:
    """The document of a line, none where there is only space."""
    if not line.strip():
        return
    where = f"{name}:{number}"
    try:
        row = json.loads(_decoded(line, name, number))
    except (ValueError, RecursionError) as problem:
        reason = getattr(problem, "msg", "nested too deeply, or with endless digits")
        raise MoetoolError(
            f"a line is not JSON ({reason})",
            file=where,
            expected='a JSON object like {"text": "..."}',
            found=_short(line),
            hint="repair that line; plain text belongs into a .txt file",
        ) from None
    if not isinstance(row, dict):
        raise MoetoolError(
            "a line is not a JSON object",
            file=where,
            expected='{"text": "..."}',
            found=_short(line),
            hint="one object a line",
        )
    yield from of_row(row, where, field)


def of_row(row: JsonObject, where: str, field: str) -> Iterator[Document]:
    """The document of an object, none where its text is empty."""
    names = (field,) if field else FIELDS
    name = next((n for n in names if row.get(n) is not None), None)
    if name is None:
        raise MoetoolError(
            "there is no text field",
            file=where,
            expected=" or ".join(names),
            found=", ".join(map(str, row)) or "an empty object",
            hint="name the field: --text-field NAME",
        )
    value = row[name]
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, TypeError):  # half of a surrogate pair; a parquet's own types
        value = None
    if isinstance(value, str):
        if value.strip():
            yield Document(where, value)
    elif isinstance(value, list) and value and all(map(_is_id, value)):
        yield Document(where, ids=tuple(value))
    elif (
        isinstance(value, list)
        and value
        and all(
            isinstance(v, dict)
            and isinstance(v.get("content"), str)
            and isinstance(v.get("role"), str)
            for v in value
        )
    ):
        yield Document(
            where, messages=tuple({"role": v["role"], "content": v["content"]} for v in value)
        )
    else:
        raise MoetoolError(
            "the text field holds no text",
            file=where,
            expected="a string, a list of token ids, or a list of {role, content}",
            found=f"{name}: {_short(repr(value).encode())}",
            hint="name another field: --text-field NAME",
        )


def _is_id(value: object) -> bool:
    """A token's number, of any vocabulary."""
    return type(value) is int and 0 <= value < 1 << 31


def _short(data: bytes) -> str:
    return data[:60].decode("utf-8", "replace").strip() + ("..." if len(data) > 60 else "")


def _parquet(path: Path, field: str) -> Iterator[Document]:
    table = Table.open(path, field)
    for group in range(table.groups):
        yield from table.rows(group)


@dataclass(frozen=True)
class Table:
    """The text column of a .parquet file. `first`: the number of rows before each row group."""

    path: Path
    field: str
    column: str
    first: tuple[int, ...]

    @property
    def groups(self) -> int:
        return len(self.first)

    @classmethod
    def open(cls, path: Path, field: str) -> Table:
        """Read the schema; MoetoolError when there is no text in it, UsageError without pyarrow."""
        with _arrow(path) as file:
            known = file.schema_arrow.names
            wanted = [n for n in ((field,) if field else FIELDS) if n in known]
            if not wanted:
                raise MoetoolError(
                    "there is no text column",
                    file=path,
                    expected=field or " or ".join(FIELDS),
                    found=", ".join(known[:8]),
                    hint="name the column: --text-field NAME",
                )
            rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        return cls(path, field, wanted[0], tuple(accumulate(rows, initial=0))[:-1])

    def rows(self, group: int) -> Iterator[Document]:
        """The documents of a row group, a few at a time."""
        number = self.first[group]
        with _arrow(self.path) as file:
            batches = file.iter_batches(
                batch_size=ROWS, row_groups=[group], columns=[self.column], use_threads=False
            )
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    if row[self.column] is not None:
                        yield from of_row(row, f"{self.path}:{number}", self.field)


@contextmanager
def _arrow(path: Path) -> Iterator[Any]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError(
            "reading .parquet needs pyarrow",
            file=path,
            hint="pip install 'moetool[parquet]', or convert the file to .jsonl",
        ) from None
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except arrow.ArrowException as problem:
        raise MoetoolError(
            f"this is not a whole parquet file: {str(problem).splitlines()[0]}",
            file=path,
            hint="download it again",
        ) from None
