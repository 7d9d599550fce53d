"""What every law answers."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor

from moetool.surgery.route import Route


class Choices(NamedTuple):
    """Experts of each token [tokens, k], and their weights (None: each has the weight 1). `drops`:
    whether an expert may be -1: nobody; `counted`: those of them that the balance loss counts
    [tokens, k] (None: all).
    """

    expert: Tensor
    weight: Tensor | None
    drops: bool = False
    counted: Tensor | None = None


class Beside(NamedTuple):
    """What a law may look at beside scores. `kept`: which tokens are no padding [tokens]; `likely`:
    what tokens alone foresee of it [tokens, choices].
    """

    training: bool = False
    kept: Tensor | None = None
    likely: Tensor | None = None


USUAL = Beside()


class CombineLaw:
    """Subclass it in a file of this folder, with a `name`. `sums`: whether the weights of a token
    always sum to one; `reads`: signals that it looks at; `counts_straight`: whether what the
    balance loss counts has the gradient of the shares.
    """

    name: ClassVar[str] = ""
    sums: bool = False
    counts_straight: bool = False
    reads: ClassVar[tuple[str, ...]] = ()

    def __init__(self, route: Route) -> None:
        self.top_k = route.top_k

    def choose(self, scores: Tensor, asked: Beside = USUAL) -> Choices:
        """scores [tokens, choices] -> who runs and with which weight; shares are computed in
        float32 and given in the dtype of the scores.
        """
        raise NotImplementedError

    def shares(self, scores: Tensor) -> Tensor:
        """What each choice has of a token [tokens, choices], float32: for the balance loss."""
        return scores.float().softmax(-1)


def over_sum(weight: Tensor) -> Tensor:
    """Weights [tokens, choices] of which those of a token sum to one, where it has any."""
    total = weight.sum(-1, keepdim=True)
    return weight / total.masked_fill(total == 0, 1)
