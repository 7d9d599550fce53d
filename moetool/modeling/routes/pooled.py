"""The mean of the prompt: which experts a whole sequence has (Awaker2.5-VL, arXiv 2411.10669)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moetool.modeling.routes.kept import KeptScorer
from moetool.modeling.signals import EMBEDDINGS, KEPT, PROMPT, Heard
from moetool.modeling.spans import Span
from moetool.surgery.groups import Group

_EPS = 1e-6


class PooledScorer(KeptScorer):
    """options of the route: of, what is averaged: `embeddings` (what goes into the first layer,
    images in their place; the key gives them no gradient) or `hidden` (what the FFN sees); norm,
    whether the mean goes through an RMSNorm (`norm` [hidden], its weight less one); begin, end: ids
    of tokens: of a prompt counts what lies from the first of `begin` (else: its first token) up to,
    and without, the next of `end` (else: its last).

    The prompt is what `prompt=` says, else what `labels` leave out, else all of a call.
    """

    name: ClassVar[str] = "pooled"
    sites: ClassVar[tuple[str, ...]] = ("ffn", "linear")
    weight: Tensor

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__(group, hidden)
        said = group.route.options
        self.embedded = said.get("of", EMBEDDINGS) == EMBEDDINGS
        self.span = Span(tuple(said.get("begin", ())), tuple(said.get("end", ())))
        more = (EMBEDDINGS,) if self.embedded else ()
        self.reads = (KEPT, PROMPT, *more)  # type: ignore[misc]

    def key(self, x: Tensor, heard: Heard) -> Tensor:
        seen = heard.read(EMBEDDINGS).to(x) if self.embedded else x
        prompt = heard.read(PROMPT).to(x.device).unsqueeze(-1)
        total = (seen * prompt).sum(1, dtype=torch.float32)
        return (total / prompt.sum(1).clamp(min=1)).to(x.dtype)

    def score(self, key: Tensor) -> Tensor:
        norm = self.held("norm")
        if norm is not None:
            key = functional.rms_norm(key, key.shape[-1:], 1 + norm, _EPS)
        return functional.linear(key, self.weight, self.held("bias"))
