"""Where moetool opens what it was pointed at: regular files only, and not more of them than fits.

A pipe without a writer, a terminal or `/dev/zero` would be waited for, or read, for ever. Every
path that comes from a user or from a checkpoint is opened here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from moetool.errors import MoetoolError

SMALL = 256 << 20  # more than any config, index, tokenizer config or recipe there is
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def check_regular(path: str | Path, what: str) -> None:
    """MoetoolError when something stands at `path` that is not a regular file (a link is followed);
    OSError, FileNotFoundError among it, as the system says them.
    """
    _check(os.stat(path).st_mode, path, what)


def _check(mode: int, path: str | Path, what: str) -> None:
    if not stat.S_ISREG(mode):
        raise MoetoolError(
            f"the {what} is no regular file",
            file=path,
            expected="a regular file",
            found=_KINDS.get(stat.S_IFMT(mode), "something else"),
            hint="give a file; where text may come from a pipe, - reads standard input",
        )


def opened(path: str | Path, what: str) -> BinaryIO:
    """The file, open for reading bytes; never waits for a pipe. Errors as in `check_regular`."""
    check_regular(path, what)
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(os.fstat(handle).st_mode, path, what)  # it may have been replaced since
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read(path: str | Path, what: str, *, limit: int = SMALL) -> bytes:
    """All bytes of a small file. MoetoolError when it is larger than `limit` bytes."""
    with opened(path, what) as handle:
        size = os.fstat(handle.fileno()).st_size  # asked for more, `read` would take that much
        data = handle.read(min(size, limit) + 1)
    if len(data) > limit:
        raise MoetoolError(
            f"the {what} is too large",
            file=path,
            expected=f"at most {limit:,} bytes",
            found="more",
            hint="this is not the file it should be: restore it",
        )
    return data
