"""What every law answers."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor

from moetool.surgery.route import Route


class Choices(NamedTuple):
    """Experts of each token [tokens, k], and their weights (None: each has the weight 1)."""

    expert: Tensor
    weight: Tensor | None


class CombineLaw:
    """Subclass it in a file of this folder, with a `name`. `sums`: whether the weights of a token
    always sum to one.
    """

    name: ClassVar[str] = ""
    sums: ClassVar[bool] = False

    def __init__(self, route: Route) -> None:
        self.top_k = route.top_k

    def choose(self, scores: Tensor) -> Choices:
        """scores [tokens, choices] -> who runs and with which weight; shares are computed in
        float32 and given in the dtype of the scores.
        """
        raise NotImplementedError
