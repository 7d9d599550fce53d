"""What a pruning way is: a score for each expert, or a choice of those that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from moetool.methods.contract import Certificate
from moetool.methods.reduce import beside
from moetool.methods.reduce.decision import Decision
from moetool.methods.reduce.way import Way, refuse_quantized, ways
from moetool.methods.reduce.writing import Writing

if TYPE_CHECKING:
    import numpy as np

    from moetool.methods.reduce.view import View
    from moetool.surgery.experts import Mixture


class PruneWay(Way):
    """Subclass it in a file of this folder: give `name`, say what it `needs`, and define `score`
    or `keep`.
    """

    copies = True

    @classmethod
    def known(cls) -> Mapping[str, type[PruneWay]]:
        import moetool.methods.prune as package

        return ways(package, PruneWay)

    def check(self, mixture: Mixture) -> None:
        if self.needs.text or self.needs.weights:
            refuse_quantized(mixture, f"--method {self.called}")
        elif self.options.refit or self.options.propagate:
            refuse_quantized(mixture, "--refit and --propagate")

    def score(self, view: View) -> np.ndarray:
        """How much each expert is needed, [experts] float64; the smallest go."""
        raise NotImplementedError

    @property
    def scores(self) -> Callable[[View], np.ndarray] | None:
        return None if type(self).score is PruneWay.score else self.score

    def keep(self, view: View, count: int) -> list[int]:
        """The experts that stay: the best of each router group, protected ones first."""
        score = self.score(view)
        kept: list[int] = []
        for members in view.groups():
            order = sorted(members, key=lambda e: (e not in view.protected, -score[e], e))
            kept += order[: view.share(count)]
        return sorted(kept)

    def choose(self, view: View, count: int) -> Decision:
        kept, scores = self.keep(view, count), self.scores
        shown = tuple(float(s) for s in scores(view)) if scores else ()
        return Decision.keep(kept, scores=shown, protected=view.protected)

    def facts(self, mixture: Mixture) -> dict[str, object]:
        return {"router": "rows of the kept experts"}

    def certificate(self, writing: Writing) -> Certificate:
        """A reduced model is another function; nothing removed is the same one."""
        whole = all(d.whole(writing.mixture.experts) for d in writing.decided.layers.values())
        if whole and not writing.extra:
            return Certificate("exact", "nothing was removed: a copy")
        return Certificate(
            "none",
            f"experts were removed{self._others(writing)}: another function, by how much `moetool eval --reference` measures",
            None,
        )

    def _others(self, writing: Writing) -> str:
        """What became of those that stay."""
        if beside.solved(writing.extra):
            return ", down_proj of the others was solved again"
        moved = self.maker(writing) is None and self.options.form in ("auto", "same")
        return ", the others are byte for byte" if moved else ""
