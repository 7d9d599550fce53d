"""What a pruning method is: a score for each expert, or a choice of those that stay. One file in
this folder each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import numpy as np

from moetool.methods import discover
from moetool.methods.reduce.decision import Layer
from moetool.methods.reduce.view import View


class Criterion:
    """Subclass it in a file of this folder: give `name`, say what it needs, and define `score` or
    `keep`.

    text: needs statistics; sample: needs that many of the block's inputs; constant: what goes
    stays as a constant.
    """

    name: ClassVar[str] = ""
    text: ClassVar[bool] = True
    sample: ClassVar[int] = 0
    constant: ClassVar[bool] = False
    buffers: ClassVar[int] = 0  # bytes held beside a layer's block

    def score(self, view: View) -> np.ndarray:
        """How much each expert is needed, [experts] float64; the smallest go."""
        raise NotImplementedError

    def keep(self, view: View, count: int) -> list[int]:
        """The experts that stay: the best of each router group, protected ones first."""
        score = self.score(view)
        kept: list[int] = []
        for members in view.groups():
            order = sorted(members, key=lambda e: (e not in view.protected, -score[e], e))
            kept += order[: view.share(count)]
        return sorted(kept)

    def decide(self, view: View, count: int) -> Layer:
        """The decision for a layer."""
        kept = self.keep(view, count)
        scores = (
            () if type(self).score is Criterion.score else tuple(float(s) for s in self.score(view))
        )
        return Layer.keep(kept, scores=scores, protected=view.protected)


@lru_cache(maxsize=1)
def criteria() -> dict[str, type[Criterion]]:
    """Every pruning method, by name."""
    import moetool.methods.prune as package

    return discover.classes(package, Criterion)


def get(name: str) -> Criterion:
    """The pruning method of this name; UsageError with the nearest names."""
    return discover.named(name, criteria(), "pruning")()
