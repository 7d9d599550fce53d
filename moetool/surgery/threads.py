"""How many threads torch uses inside workers of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def single() -> Iterator[None]:
    """Threads that begin within compute with one thread each. What works through a cache's worth of
    weights at a time gains nothing from a second one, which waits for every step in a loop: on a
    busy machine that took three times the CPU seconds.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
