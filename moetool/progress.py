"""How far a long piece of work is: one signature for everybody who tells it, and one for nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """What is being done, and what is counted meanwhile."""

    name: str
    unit: Literal["bytes", "layers", "tokens"] = "bytes"


# (stage, what is done, all of it), in the stage's unit.
Progress = Callable[[Stage, int, int], None]


def silent(stage: Stage, done: int, total: int) -> None:
    """A Progress that nobody hears: the default everywhere."""
