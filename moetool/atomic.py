"""Files and folders that are whole or not there: written beside their place, then renamed into it.

A rename within one folder is the only step that a reader, or a process that is killed, can see.
Every file that moetool leaves goes through here, and every rename is one call of `os.replace`.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetool.errors import MoetoolError

SUFFIX = ".tmp"


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names, before anything is built on them: a
    rename may reach the disk before what it names. OSError is what the disk says.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Every file of a folder, and of those in it, then the folder."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            sync(path)
        elif path.is_dir():
            sync_all(path)
    sync(folder)


def beside(path: Path) -> Path:
    """Where a file is written before it gets its name: `x.json` -> `x.json.tmp`."""
    return path.with_name(path.name + SUFFIX)


def publish(temporary: Path) -> Path:
    """Give a file that was written at `beside(path)` its name; returns `path`."""
    path = temporary.with_name(temporary.name.removesuffix(SUFFIX))
    os.replace(temporary, path)
    return path


@contextmanager
def writing(path: Path, *, keep_same: bool = False) -> Iterator[Path]:
    """Yield a place to write to; what was written there becomes `path` when the block ends well.

    After an error nothing is left. `keep_same`: a file that already has these very bytes stays
    as it is, its time included (somebody may be reading it).
    """
    temporary = beside(path)
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if keep_same and path.exists() and filecmp.cmp(temporary, path, shallow=False):
        temporary.unlink()
        return
    publish(temporary)


def write(path: Path, data: bytes | str) -> None:
    """Write a small file; text is UTF-8."""
    with writing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def copy(source: str | Path, path: Path) -> None:
    """Copy a file's bytes."""
    with writing(path) as temporary:
        shutil.copyfile(source, temporary)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder."""
    for left in folder.rglob("*" + SUFFIX):
        left.unlink()


def aside(out: Path) -> Path:
    """Where a folder that is replaced waits until the new one stands."""
    return out.with_name(f".{out.name}.moetool-old")


def publish_folder(staging: Path, out: Path, *, overwrite: bool = False) -> None:
    """Move a finished folder to its place; with `overwrite` a folder that is there makes room.

    Raises MoetoolError when the place was filled meanwhile.
    """
    old = aside(out)
    moved = overwrite and out.exists()
    if moved:
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
    try:
        os.replace(staging, out)
    except OSError as problem:
        if moved and not out.exists():
            os.replace(old, out)
        if problem.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise MoetoolError(
                "the output folder was filled while moetool worked",
                file=out,
                hint="look at it, remove it, and run the same command again",
            ) from None
        raise
    with contextlib.suppress(OSError):
        shutil.rmtree(old, ignore_errors=True)
