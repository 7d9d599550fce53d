"""The first token of a sequence, as [CLS] is: which experts the whole of it has."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moetool.modeling.routes.kept import KeptScorer
from moetool.modeling.signals import KEPT, Heard


class SequenceScorer(KeptScorer):
    """What a module sees of the first token that is no padding."""

    name: ClassVar[str] = "sequence"
    sites: ClassVar[tuple[str, ...]] = ("ffn", "attention")
    weight: Tensor

    def key(self, x: Tensor, heard: Heard) -> Tensor:
        first = heard.read(KEPT).to(x.device).int().argmax(-1)
        return x[torch.arange(len(x), device=x.device), first]

    def score(self, key: Tensor) -> Tensor:
        return functional.linear(key, self.weight, self.held("bias"))
