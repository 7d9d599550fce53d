"""What ways of sending text through a model share (walk.py, whole.py): they can be stopped, and
answer afterwards.
"""

from __future__ import annotations

import threading
from typing import ClassVar

import torch

from moetool.errors import Stopped
from moetool.forward import stock
from moetool.forward.batches import Batches
from moetool.forward.calls import Calls
from moetool.surgery.checkpoint import Checkpoint

Tensor = torch.Tensor


class TextThrough:
    """Subclass it with a `run` that sends every batch, and say with `last` what came out. `kept`:
    what of it stays when it is stopped, for the sentence.
    """

    kept: ClassVar[str] = ""
    source: Checkpoint
    batches: Batches
    calls: Calls
    stop: threading.Event

    def last(self, number: int) -> Tensor:
        """What the last layer gave for a batch [sequences, length, hidden], after `run`."""
        raise NotImplementedError

    def maybe_stop(self) -> None:
        """Stopped where somebody wishes it."""
        if self.stop.is_set():
            raise Stopped(
                "stopped while text went through the model",
                file=self.source.folder,
                hint=f"run the same command again{self.kept}",
            )

    @torch.no_grad()
    def logits(self, number: int, start: int, stop: int) -> Tensor:
        """The head's answer [sequences, stop - start, vocabulary] for a batch after `run`, places
        start:stop only.
        """
        batch = self.batches.batches[number]
        with stock.running(self.source.folder):
            return self.calls.leave(batch, self.last(number), torch.arange(start, stop))
