"""Documents for calibration and evaluation: .txt, .jsonl, .parquet, a Hub dataset, or standard
input, each with a share of the mix; `demo` is the embedded text, `random` token ids from a seed,
`own` what the model writes itself.

Whatever is wrong with a file is said with its name and line. Nothing here needs torch.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

from moetool.demo import TEXT
from moetool.errors import MoetoolError, UsageError
from moetool.forward import documents, drawn, large
from moetool.forward.documents import Document
from moetool.forward.drawn import Drawn
from moetool.forward.large import Large
from moetool.kernels import draw
from moetool.surgery.source import DATASET, HubId

_SHARE = re.compile(r"(?P<path>.+):(?P<share>\d*\.?\d+)")


@dataclass(frozen=True)
class Corpus:
    """The documents of one `--calibrate` or `--text`, and its share of the tokens."""

    name: str
    share: float
    documents: tuple[Document, ...] | Large | Drawn

    def order(self, seed: int | None) -> Iterator[Document]:
        """All documents: as they lie, or in an order drawn from the seed."""
        if isinstance(self.documents, Drawn):
            return  # ids, and no documents
        if isinstance(self.documents, Large):
            yield from self.documents.order(seed)
        elif seed is None:
            yield from self.documents
        else:
            for place in draw.permutation(len(self.documents), seed, "documents"):
                yield self.documents[place]


def read(specs: Sequence[str], *, field: str = "", option: str = "calibrate") -> list[Corpus]:
    """Read every spec (`PATH[:SHARE]`). Shares are parts of the whole; files without one divide
    what is left. option: the one that names text, for whoever gave none.

    Raises UsageError for shares that do not add up, MoetoolError naming file and line for anything
    unreadable.
    """
    if not specs:
        raise UsageError(
            "no text given",
            hint=f"--{option} FILE (.txt, .jsonl, .parquet, a Hub dataset, - for standard input, random or own)",
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
            _documents(path, field),
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


def _documents(name: str, field: str) -> tuple[Document, ...] | Large | Drawn:
    if drawn.means(name):
        return Drawn(drawn.means(name))
    if name == "-":
        found = _from_stdin(field)
    else:
        paths = _files(name)
        held = sum(path.stat().st_size for path in paths) <= large.HELD
        found = _held(paths, field) if held else large.of(paths, field)
    if not any(map(len, found.files if isinstance(found, Large) else [found])):
        raise MoetoolError(
            "there is no text here",
            file=name,
            expected="at least one document",
            found="nothing",
            hint="give a file with text in it",
        )
    return found


def _held(paths: Sequence[Path], field: str) -> tuple[Document, ...]:
    return tuple(chain.from_iterable(documents.of_file(path, field) for path in paths))


def _from_stdin(field: str) -> tuple[Document, ...] | Large:
    data, name = stdin(), "<stdin>"
    if isinstance(data, Path):
        return large.of([data], field, name)
    if data.lstrip()[:1] == b"{":
        return tuple(documents.jsonl(name, data.split(b"\n"), field))
    return tuple(documents.plain(name, data))


def _files(name: str) -> list[Path]:
    """The files that a name stands for: itself, or those of a Hub dataset."""
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
    if path.exists():
        return [path]
    hub = HubId.read(name)
    if hub is None or path.suffix in (".txt", ".jsonl", ".parquet", ".json"):
        raise MoetoolError(
            "there is no such file",
            file=name,
            hint="check the path; a Hub dataset is written org/name[@revision]",
        )
    return _downloaded(hub)


@lru_cache(maxsize=1)
def stdin() -> bytes | Path:
    """Standard input, read once however often a command needs its text: as bytes, or, where it is
    long, in a file that goes with the process.
    """
    begun = sys.stdin.buffer.read(large.HELD + 1)
    if len(begun) <= large.HELD:
        return begun
    suffix = ".jsonl" if begun.lstrip()[:1] == b"{" else ".txt"
    handle, name = tempfile.mkstemp(suffix, "moetool-")
    atexit.register(Path(name).unlink, missing_ok=True)
    with os.fdopen(handle, "wb") as file:
        file.write(begun)
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return Path(name)


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
