"""Which neurons of an FFN matter to which tokens, and what parts that makes (LLaMA-MoE v2, arXiv
2411.15708; OpenSparseLLMs/LLaMA-MoE-v2: expert_split_residual.py, split_gradient_get_grads_v2.py).
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Importance:
    """Sums of |h * gradient| of each neuron over the tokens of each cluster [clusters, width]. A
    token's cluster is the centre [clusters, hidden] with which its product is largest.
    """

    def __init__(self, centres: Tensor, width: int) -> None:
        self.centres = centres
        self.sums = centres.new_zeros(len(centres), width).double()
        self.tokens = centres.new_zeros(len(centres)).double()

    def add(self, x: Tensor, h: Tensor, gradient: Tensor) -> None:
        """Tokens x [tokens, hidden], with h and the loss's gradient by it [tokens, width]."""
        mine = (x.float() @ self.centres.T).argmax(-1)
        self.sums.index_add_(0, mine, (h * gradient).abs().double())
        self.tokens += mine.bincount(minlength=len(self.tokens))

    def means(self) -> np.ndarray:
        """Of each neuron [clusters, width]; zero for a cluster without tokens."""
        made: np.ndarray = (self.sums / self.tokens.clamp_min(1.0)[:, None]).cpu().numpy()
        return made


def order(scores: np.ndarray, parts: int, shared: int) -> np.ndarray:
    """All neurons [width], those of the shared parts first, then part after part. scores
    [parts - shared, width].

    Shared are, again and again, the neurons that most experts have among their best ones; the
    others go, the highest score first, to whom it belongs, until that part is full (ties: to the
    later expert, as the reference code has it).
    """
    experts, width = scores.shape
    wide = width // parts
    ranked = np.argsort(-scores, axis=1, kind="stable")
    always = _shared(ranked, wide, wide * shared)
    free = np.ones(width, bool)
    free[always] = False
    places: list[list[int]] = [[] for _ in range(experts)]
    rank = np.arange(experts)[::-1]
    pairs = chain.from_iterable(((int(e), int(n)) for n in ranked[e]) for e in rank)
    every = [(float(scores[e, n]), e, n) for e, n in pairs]
    for _, expert, neuron in sorted(every, key=lambda one: (-one[0], -one[1])):
        if free[neuron] and len(places[expert]) < wide:
            free[neuron] = False
            places[expert].append(neuron)
    return np.concatenate([always, *map(np.array, places)]).astype(np.int64)


def _shared(ranked: np.ndarray, wide: int, count: int) -> np.ndarray:
    """The neurons that stand in most lists of the best `wide`, taken out of the lists as they are
    found, until there are `count`.
    """
    found: list[int] = []
    free = np.ones(ranked.shape[1], bool)
    while len(found) < count:
        best = np.concatenate([row[free[row]][:wide] for row in ranked])
        often = np.bincount(best, minlength=ranked.shape[1])
        chosen = np.flatnonzero(often == often.max())[: count - len(found)]
        found += chosen.tolist()
        free[chosen] = False
    return np.array(found, np.int64)
