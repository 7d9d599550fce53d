"""Pick a method of a folder by its name: a new method is a new file, and shows up by itself."""

from __future__ import annotations

from typing import TypeVar

from moetool.discover import classes
from moetool.errors import UsageError, did_you_mean

__all__ = ["classes", "named"]

Kind = TypeVar("Kind")


def named(name: str, known: dict[str, type[Kind]], what: str) -> type[Kind]:
    """The class of this name; UsageError with the nearest names."""
    if name not in known:
        raise UsageError(f"no {what} method {name!r}", hint=did_you_mean(name, [*known, "auto"]))
    return known[name]
