"""How far a long piece of work is: one signature for everybody who tells it, and one for nobody."""

from __future__ import annotations

import threading
import time
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


def unheard(sentence: str) -> None:
    """Takes a sentence that nobody hears."""


def silent(stage: Stage, done: int, total: int) -> None:
    """A Progress that nobody hears: the default everywhere."""


class Clock:
    """A Progress that hands on what it hears, and knows the seconds of each stage: from one word
    to the next they are the later one's, but for a stage that only begins.
    """

    def __init__(self, tell: Progress = silent) -> None:
        self._tell, self._lock, self._last = tell, threading.Lock(), time.perf_counter()
        self._spent: dict[str, float] = {}

    def __call__(self, stage: Stage, done: int, total: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if done:
                self._spent[stage.name] = self._spent.get(stage.name, 0.0) + now - self._last
            self._last = now
        self._tell(stage, done, total)

    def taken(self) -> dict[str, float]:
        """Seconds of each stage since it was asked last, in the order in which they came."""
        with self._lock:
            spent, self._spent, self._last = self._spent, {}, time.perf_counter()
        return {name: round(seconds, 3) for name, seconds in spent.items()}
