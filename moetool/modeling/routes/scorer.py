"""What every key of a route answers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moetool.modeling.piece import GrownPart
from moetool.surgery.groups import Group


class Scorer(GrownPart):
    """Subclass it in a file of this folder, with a `name`; built with the group whose experts it
    scores and the width of a token.
    """

    name: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()  # signals that forward takes after x, [tokens] each

    def __init__(self, group: Group, hidden: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, *signals: Tensor) -> Tensor:
        """[tokens, hidden] -> scores [tokens, choices]."""
        raise NotImplementedError
