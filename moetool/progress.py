"""How far a long piece of work is: one signature for everybody who tells it, and one for nobody."""

from __future__ import annotations

from collections.abc import Callable

# (stage, what is done, all of it): bytes, tokens or layers, whatever the stage counts.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """A Progress that nobody hears: the default everywhere."""
