"""The first token of a sequence, as [CLS] is: which experts the whole of it has."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moetool.errors import UsageError
from moetool.modeling.routes.kept import KeptScorer
from moetool.modeling.signals import KEPT, Heard
from moetool.surgery.groups import Group


class SequenceScorer(KeptScorer):
    """What a module sees of the first token that is no padding. options of the route: patch, with
    which all tokens choose together, so many one after the other: `weight` [choices, patch *
    hidden] of them beside each other, zero where a patch is not full (UoE, arXiv 2503.02495).

    **A patch is not causal**: its first tokens see its last ones, where these are there already.
    While a cache grows a token sees those before it.
    """

    name: ClassVar[str] = "sequence"
    sites: ClassVar[tuple[str, ...]] = ("ffn", "attention")
    weight: Tensor

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__(group, hidden)
        self.patch = int(group.route.options.get("patch", 0))
        self.count: Tensor | None = None  # tokens of each sequence that are no padding, so far

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        return self._patches(x, heard) if self.patch else super().forward(x, heard)

    def _patches(self, x: Tensor, heard: Heard) -> Tensor:
        """x [batch * length, hidden] -> scores of each token's patch."""
        kept = heard.read(KEPT).to(x.device)
        wide = x.view(*self._lying(x, kept), -1)
        past = kept.new_zeros(len(kept), dtype=torch.long)
        if not heard.fresh:
            begun, past = self._begun(len(kept)).to(x), self._counted(kept)
        place = (past % self.patch)[:, None] + kept.long().cumsum(-1) - 1
        number, slot = place.clamp(min=0) // self.patch, place.clamp(min=0) % self.patch
        rows = torch.arange(len(kept), device=x.device)[:, None].expand(kept.shape)
        held = x.new_zeros(len(kept), int(number.max()) + 1, self.patch, wide.shape[-1])
        if not heard.fresh:
            held[:, 0] = begun
        held = held.index_put((rows[kept], number[kept], slot[kept]), wide[kept])
        self.count = past + kept.sum(-1)
        self.begun = held[rows[:, 0], number[:, -1]].detach()
        full = self.count % self.patch == 0
        self.begun[full] = 0
        scores = self.score(held.flatten(2))
        return scores[rows, number].flatten(0, 1)

    def _lying(self, x: Tensor, kept: Tensor) -> tuple[int, int]:
        if len(x) != kept.numel():
            raise UsageError(
                f"a route by {self.name} does not see whole sequences",
                expected=f"tokens of {list(kept.shape)}",
                found=f"{len(x)} tokens",
                hint="run the whole model on one batch",
            )
        return kept.shape[0], kept.shape[1]

    def _counted(self, kept: Tensor) -> Tensor:
        assert self.count is not None  # with `begun`
        return self.count.to(kept.device)

    def key(self, x: Tensor, heard: Heard) -> Tensor:
        first = heard.read(KEPT).to(x.device).int().argmax(-1)
        return x[torch.arange(len(x), device=x.device), first]

    def score(self, key: Tensor) -> Tensor:
        return functional.linear(key, self.weight, self.held("bias"))
