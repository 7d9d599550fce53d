"""Documents for calibration and evaluation: .txt, .jsonl, .parquet, a Hub dataset, or standard
input, each with a share of the mix; `demo` is the embedded text.

Whatever is wrong with a file is said with its name and line. Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from moetool.data import JsonObject
from moetool.demo import TEXT
from moetool.errors import MoetoolError, UsageError
from moetool.reading import check_regular, opened
from moetool.surgery.source import DATASET, HubId

MAX_LINE = 64 << 20
FIELDS = ("text", "content", "input_ids", "messages")
_SHARE = re.compile(r"(?P<path>.+):(?P<share>\d*\.?\d+)")


@dataclass(frozen=True)
class Document:
    """One text, or the token ids somebody made of it, or a chat; `where` is file:line."""

    where: str
    text: str | None = None
    ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class Corpus:
    """The documents of one `--calibrate` or `--text`, and its share of the tokens."""

    name: str
    share: float
    documents: tuple[Document, ...]


def read(specs: Sequence[str], *, field: str = "") -> list[Corpus]:
    """Read every spec (`PATH[:SHARE]`). Shares are parts of the whole; files without one divide
    what is left.

    Raises UsageError for shares that do not add up, MoetoolError naming file and line for anything
    unreadable.
    """
    if not specs:
        raise UsageError(
            "no text given",
            hint="--calibrate FILE or --text FILE (.txt, .jsonl, .parquet, a Hub dataset, or - for standard input)",
        )
    named = [_split(s) for s in specs]
    given = sum(share for _, share in named if share is not None)
    free = sum(share is None for _, share in named)
    if given > 1 + 1e-9 and free:
        raise UsageError(
            "the shares leave nothing for the other files",
            expected="shares that add up to less than 1",
            found=f"{given:g}",
            hint="lower the shares, or give one to every file",
        )
    total = given if not free else 1.0
    return [
        Corpus(
            path,
            (share if share is not None else (1.0 - given) / free) / total,
            tuple(_documents(path, field)),
        )
        for path, share in named
    ]


def _split(spec: str) -> tuple[str, float | None]:
    found = _SHARE.fullmatch(spec)
    if found is None or Path(spec).exists():
        return spec, None
    if float(found["share"]) <= 0:
        raise UsageError(
            f"the share of {found['path']} is not positive",
            found=found["share"],
            hint="leave the file out instead",
        )
    return found["path"], float(found["share"])


def _documents(name: str, field: str) -> list[Document]:
    found = list(_read(name, field))
    if not found:
        raise MoetoolError(
            "there is no text here",
            file=name,
            expected="at least one document",
            found="nothing",
            hint="give a file with text in it",
        )
    return found


def _read(name: str, field: str) -> Iterator[Document]:
    if name == "-":
        data = stdin()
        yield from (
            _jsonl("<stdin>", data.split(b"\n"), field)
            if data.lstrip()[:1] == b"{"
            else _plain("<stdin>", data)
        )
        return
    path = Path(name).expanduser()
    if name == "demo" and not path.exists():
        path = TEXT
    if path.is_dir():
        inside = sorted(
            p.name for p in path.iterdir() if p.suffix in (".txt", ".jsonl", ".parquet")
        )
        raise MoetoolError(
            "this is a folder, not a file with text",
            file=path,
            expected=".txt, .jsonl or .parquet",
            found=", ".join(inside[:4]) or "no such file in it",
            hint="name the files, one --calibrate each",
        )
    if not path.exists():
        hub = HubId.read(name)
        if hub is None or path.suffix in (".txt", ".jsonl", ".parquet", ".json"):
            raise MoetoolError(
                "there is no such file",
                file=name,
                hint="check the path; a Hub dataset is written org/name[@revision]",
            )
        for file in _downloaded(hub):
            yield from _file(file, field)
        return
    yield from _file(path, field)


@lru_cache(maxsize=1)
def stdin() -> bytes:
    """Standard input, read once however often a command needs its text."""
    return sys.stdin.buffer.read()


def _file(path: Path, field: str) -> Iterator[Document]:
    try:
        check_regular(path, "text")
        if path.suffix == ".parquet":
            yield from _parquet(path, field)
        elif path.suffix in (".jsonl", ".ndjson", ".json"):
            with opened(path, "text") as handle:
                yield from _jsonl(str(path), _lines(path, handle), field)
        else:
            yield from _plain(str(path), path.read_bytes())
    except OSError as problem:
        raise MoetoolError(
            f"cannot read the text: {problem.strerror or problem}",
            file=path,
            hint="check the path and its permissions",
        ) from None


def _lines(path: Path, handle: Any) -> Iterator[bytes]:
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


def _plain(name: str, data: bytes) -> Iterator[Document]:
    text = _decode(data, name, 1)
    if text.strip():
        yield Document(name, text)


def _decode(data: bytes, name: str, line: int) -> str:
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


def _jsonl(name: str, lines: Any, field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(_decode(line, name, number))
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
        yield from _row(row, where, field)


def _row(row: JsonObject, where: str, field: str) -> Iterator[Document]:
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
        table = parquet.ParquetFile(path)
        known = table.schema_arrow.names
        wanted = [n for n in ((field,) if field else FIELDS) if n in known]
        if not wanted:
            raise MoetoolError(
                "there is no text column",
                file=path,
                expected=field or " or ".join(FIELDS),
                found=", ".join(known[:8]),
                hint="name the column: --text-field NAME",
            )
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted[:1]):
            for row in batch.to_pylist():
                number += 1
                if row[wanted[0]] is not None:
                    yield from _row(row, f"{path}:{number}", field)
    except arrow.ArrowException as problem:
        raise MoetoolError(
            f"this is not a whole parquet file: {str(problem).splitlines()[0]}",
            file=path,
            hint="download it again",
        ) from None


def _downloaded(hub: HubId) -> list[Path]:
    folder = hub.download(DATASET)
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix in (".jsonl", ".parquet", ".txt") and not p.name.lower().startswith("readme")
    )
    if not files:
        raise MoetoolError(
            "the dataset holds no file that moetool reads",
            file=hub.repo,
            expected=".jsonl, .parquet or .txt",
            hint="export it: datasets.load_dataset(...).to_json(...)",
        )
    return files
