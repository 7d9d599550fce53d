"""Which task a sequence is of, as the caller says (DMoERM, arXiv 2403.01197)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.modeling.routes.masked import MaskedScorer
from moetool.modeling.signals import TASK, Heard


class TaskScorer(MaskedScorer):
    """`task=[batch]`, a number that the table `allowed` has a row for."""

    name: ClassVar[str] = "task"
    reads: ClassVar[tuple[str, ...]] = (TASK,)

    def kinds(self, heard: Heard, tokens: int) -> Tensor:
        return heard.of_sequences(TASK, tokens)
