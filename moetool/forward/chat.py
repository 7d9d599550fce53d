"""Chats become token ids through the model's own template, which is a program of a stranger's: it
runs in the sandbox of transformers, and here within a size, a time and a room.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetool.errors import MoetoolError

if TYPE_CHECKING:
    from moetool.forward.documents import Document

LARGEST = 1 << 20  # characters of a template; the longest in use have some tens of thousands
SECONDS = 5.0  # a chat; one takes milliseconds
ROOM = 1 << 30  # bytes that rendering may add to this process


class _TooLong(BaseException):
    """Raised inside a template that does not end."""


def ids(tokenizer: Any, document: Document) -> list[int]:
    """Token ids of a chat; MoetoolError naming the document where the template is missing, too
    large or too slow, or refuses the chat.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise MoetoolError(
            "the text is a chat, but the model's tokenizer has no chat template",
            file=document.where,
            hint="give plain text, or a model with a chat template",
        )
    size = sum(map(len, template.values())) if isinstance(template, dict) else len(template)
    if size > LARGEST:
        raise _refused("is too large", document, f"{size:,} characters", f"at most {LARGEST:,}")
    try:
        with _bounded_room(), _in_time(SECONDS):
            found: list[int] = tokenizer.apply_chat_template(
                list(document.messages or ()), tokenize=True, return_dict=True
            )["input_ids"]
            return found
    except _TooLong:
        raise _refused("does not end", document, f"no answer in {SECONDS:g} seconds") from None
    except MemoryError:
        raise _refused("wants too much memory", document, f"more than {ROOM:,} bytes") from None
    except Exception as problem:  # noqa: BLE001
        said = str(problem).strip().partition("\n")[0][:200] or type(problem).__name__
        raise _refused("refuses this chat", document, said) from None


def _refused(what: str, document: Document, found: str, expected: str | None = None) -> Exception:
    return MoetoolError(
        f"the model's chat template {what}",
        file=document.where,
        expected=expected,
        found=found,
        hint="give plain text instead of messages, or a chat in the form that the model knows",
    )


@contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    """Raise _TooLong in this thread when the block has not ended in time."""
    ended, here = threading.Event(), threading.get_ident()

    def watch() -> None:
        if not ended.wait(seconds):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(here), ctypes.py_object(_TooLong)
            )

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextmanager
def _bounded_room() -> Iterator[None]:
    """Let this process grow by ROOM at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError, OSError):  # where the system does not tell, or let us
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        wanted = pages * resource.getpagesize() + ROOM
        if soft == resource.RLIM_INFINITY or wanted < soft:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
