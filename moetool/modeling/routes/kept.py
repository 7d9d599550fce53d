"""Routes that look at a sequence as a whole, once: what they saw of the prompt stays while a cache
grows.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.errors import UsageError
from moetool.modeling.routes.scorer import Scorer
from moetool.modeling.signals import KEPT, Heard
from moetool.surgery.groups import Group


class KeptScorer(Scorer):
    """Subclass it in a file of this folder, and say what is looked at (`key`) and how it is scored.
    All tokens of a sequence have the same scores. In a call whose cache holds tokens already, the
    key is the one of the call that began it.
    """

    reads: ClassVar[tuple[str, ...]] = (KEPT,)

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__(group, hidden)
        self.begun: Tensor | None = None  # the key of the call that began the cache

    def key(self, x: Tensor, heard: Heard) -> Tensor:
        """x [batch, length, hidden] -> [batch, hidden]."""
        raise NotImplementedError

    def score(self, key: Tensor) -> Tensor:
        """[batch, hidden] -> [batch, choices]"""
        raise NotImplementedError

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        batch = len(heard.read(KEPT))
        if len(x) % batch:
            raise UsageError(
                f"a route by {self.name} does not see whole sequences",
                expected=f"tokens of {batch} sequences",
                found=f"{len(x)} tokens",
                hint="run the whole model on one batch",
            )
        wide = x.view(batch, -1, x.shape[-1])
        if heard.fresh:
            key = self.key(wide, heard)
            self.begun = key.detach()
        else:
            key = self._begun(batch).to(x)
        return self.score(key).repeat_interleave(wide.shape[1], 0)

    def _begun(self, batch: int) -> Tensor:
        if self.begun is None or len(self.begun) != batch:
            raise UsageError(
                f"a route by {self.name} has not seen how these sequences begin",
                expected="a cache that this model itself filled, of as many sequences",
                found="none" if self.begun is None else f"{len(self.begun)} sequences",
                hint="give the model the whole sequences, without a cache",
            )
        return self.begun
