"""What kind of token it is: text, or one of the ids that stand for an image or another modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from moetool.modeling.routes.masked import MaskedScorer
from moetool.modeling.signals import MODALITY, Heard
from moetool.surgery.groups import Group


class ModalityScorer(MaskedScorer):
    """options beside those of its base: ids [modalities - 1] of lists, the tokens of each modality
    beside text.
    """

    name: ClassVar[str] = "modality"
    reads: ClassVar[tuple[str, ...]] = (MODALITY,)

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__(group, hidden)
        self.ids: Sequence[Sequence[int]] = group.route.options["ids"]

    def kinds(self, heard: Heard, tokens: int) -> Tensor:
        return heard.of_tokens(MODALITY, tokens)
