"""What a pruning method is: a score for each expert, or a choice of those that stay. One file in this folder each."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from typing import ClassVar

import numpy as np

from moetool.errors import UsageError, did_you_mean
from moetool.methods.reduce.decision import Layer
from moetool.methods.reduce.view import View


class Criterion:
    """Subclass it in a file of this folder: give `name`, say what it needs, and define `score` or `keep`.

    text: needs statistics; sample: needs that many of the block's inputs; constant: what goes stays as a constant.
    """

    name: ClassVar[str] = ""
    text: ClassVar[bool] = True
    sample: ClassVar[int] = 0
    constant: ClassVar[bool] = False

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
        scores = () if type(self).score is Criterion.score else tuple(float(s) for s in self.score(view))
        return Layer.keep(kept, scores=scores, protected=view.protected)


@lru_cache(maxsize=1)
def criteria() -> dict[str, type[Criterion]]:
    """Every pruning method, by name; a file that does not import is an error."""
    import moetool.methods.prune as package

    found: dict[str, type[Criterion]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for thing in vars(module).values():
            if isinstance(thing, type) and issubclass(thing, Criterion) and thing.name and thing.__module__ == module.__name__:
                found[thing.name] = thing
    return dict(sorted(found.items()))


def get(name: str) -> Criterion:
    """The pruning method of this name; UsageError with the nearest names."""
    if name not in criteria():
        raise UsageError(f"no pruning method {name!r}", hint=did_you_mean(name, [*criteria(), "auto"]))
    return criteria()[name]()
