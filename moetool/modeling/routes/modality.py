"""What kind of token it is: text, or one of the ids that stand for an image or another modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetool.errors import MoetoolError
from moetool.modeling.routes.scorer import Scorer
from moetool.surgery.groups import Group

_STD = 0.02
_OPTIONS = ("allowed", "ids", "routers")


class ModalityScorer(Scorer):
    """options of the route: allowed [modalities][choices], who may use what; ids [modalities - 1]
    of lists, the tokens of each modality beside text; routers: `one` (`weight` [choices, hidden])
    or `each` ([modalities * choices, hidden]) where a token has a choice.
    """

    name: ClassVar[str] = "modality"
    reads: ClassVar[tuple[str, ...]] = ("modality",)

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__(group, hidden)
        said = group.route.options
        _check(group, said)
        self.allowed: Sequence[Sequence[int]] = said["allowed"]
        self.ids: Sequence[Sequence[int]] = said["ids"]
        self.each = said.get("routers") == "each"
        self.weight = nn.Parameter(torch.empty(group.rows, hidden)) if group.rows else None

    def reset(self) -> None:
        from transformers import initialization as init

        if self.weight is not None:
            init.normal_(self.weight, std=_STD)

    def forward(self, x: Tensor, *signals: Tensor) -> Tensor:
        """x [tokens, hidden] and the modality [tokens] -> scores [tokens, choices]; -inf for
        choices that a token may not use.
        """
        (modality,) = signals
        allowed = torch.tensor(self.allowed, dtype=torch.bool, device=x.device)[modality]
        scores = x.new_zeros(allowed.shape)
        if self.weight is not None:
            scores = functional.linear(x, self.weight)
        if self.each:
            every = scores.view(len(x), len(self.allowed), -1)
            scores = every[torch.arange(len(x), device=x.device), modality]
        return scores.masked_fill(~allowed, -torch.inf)


def _check(group: Group, said: Any) -> None:
    """Refuse options that are not those of a route by modality, or do not fit each other."""
    rows, ids = said.get("allowed"), said.get("ids")
    fits = isinstance(rows, list) and isinstance(ids, list) and len(rows) == len(ids) + 1
    shapes = fits and all(len(r) == group.choices and sum(r) >= group.route.top_k for r in rows)
    if not shapes or set(said) - set(_OPTIONS):
        raise MoetoolError(
            "the options of a route by modality do not fit",
            file="config.json",
            expected=f"{', '.join(_OPTIONS)}; a row of {group.choices} for each modality, at least "
            f"top_k {group.route.top_k} of them 1",
            found=str(dict(said))[:200],
            hint="restore the config.json that came with the model",
        )
