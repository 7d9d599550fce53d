"""One process a folder: two that fill the same one would mix what they find."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from moetool.errors import MoetoolError

NAME = "moetool-lock"


class Lock:
    """A folder that is ours until `release`, or until the process ends, however it ends. The file
    that says so goes with it, and so does a folder that then is empty.
    """

    def __init__(self, folder: Path, handle: int) -> None:
        self.folder, self._handle = folder, handle

    @classmethod
    def take(cls, folder: Path, what: str) -> Lock:
        """Make the folder and lock it; MoetoolError when another process has it (`what` it is)."""
        while True:
            handle = _opened(folder)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                raise MoetoolError(
                    f"another moetool process is working on {what}",
                    file=folder,
                    hint="wait for it, or choose another folder",
                ) from None
            if _is_there(folder, handle):
                return cls(folder, handle)
            os.close(handle)  # it went with its last owner

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._handle < 0:
            return
        if _is_there(self.folder, self._handle):
            with contextlib.suppress(OSError):
                (self.folder / NAME).unlink()
                self.folder.rmdir()
        os.close(self._handle)
        self._handle = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def _opened(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as problem:
        raise MoetoolError(
            f"cannot write here: {problem.strerror}",
            file=folder,
            hint="choose a folder you may write to",
        ) from None


def _is_there(folder: Path, handle: int) -> bool:
    """Whether the locked file still has its name."""
    try:
        return os.path.samestat(os.stat(folder / NAME), os.fstat(handle))
    except OSError:
        return False
