"""A dropped expert becomes a constant, where the family can hold one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moetool.errors import MoetoolError
from moetool.methods.prune.way import PruneWay
from moetool.methods.reduce.decision import Decision
from moetool.surgery import layout
from moetool.surgery.spec import Task

if TYPE_CHECKING:
    import numpy as np

    from moetool.methods.contract import Builder
    from moetool.methods.reduce.decided import Decided
    from moetool.methods.reduce.view import View
    from moetool.methods.reduce.writing import Cluster, Writing
    from moetool.surgery.checkpoint import Checkpoint
    from moetool.surgery.experts import Mixture
    from moetool.surgery.spec import Piece

BIAS = "down_bias"  # what holds the constant


class Mone(PruneWay):
    """MoNE (arXiv 2507.00390): how often an expert is chosen times how much its output varies,
    sqrt of the summed variance; an expert that goes leaves its mean output behind. Only families
    whose experts have a bias on down_proj can hold that constant; the number of experts stays,
    their matrices are zero.
    """

    name = "mone"
    writes = frozenset({"constant"})
    solvable = False
    one_profile = True  # a walk would go on as if the constants were still experts

    def told(self) -> None:
        super().told()
        self.check_walk()

    def check(self, mixture: Mixture) -> None:
        super().check(mixture)
        if BIAS not in mixture.pieces(mixture.layers[0], 0):
            raise MoetoolError(
                f"the experts of {mixture.layout.model_type} cannot be constants: their down_proj has no bias",
                expected=layout.those(lambda known: known.role(f"expert.{BIAS}") is not None),
                hint="--method reap removes experts instead",
            )

    def score(self, view: View) -> np.ndarray:
        import numpy as np

        mean = view.seen.mean("out_sum")
        variance = np.maximum(view.seen.mean("out_sq") - mean * mean, 0.0).sum(1)
        score: np.ndarray = np.sqrt(variance) * view.seen.mean("gate")
        score = score * view.seen.total("count")[: view.experts] / max(1, view.seen.tokens)
        return score

    def choose(self, view: View, count: int) -> Decision:
        """Everybody stays, those that would go as constants."""
        kept = super().choose(view, count)
        gone = sorted(set(range(view.experts)) - set(kept.leads))
        return Decision.keep(
            range(view.experts), scores=kept.scores, protected=kept.protected, constant=tuple(gone)
        )

    @classmethod
    def claims(cls, decided: Decided) -> bool:
        return any(decision.constant for decision in decided.layers.values())

    def sources(
        self, mixture: Mixture, decided: Decided, stats: str, work: str
    ) -> tuple[Checkpoint, ...]:
        """The mean output of every expert that becomes a constant, in the model's own dtype."""
        import torch

        from moetool.forward import solve
        from moetool.forward.stats import Profile
        from moetool.kernels import codec
        from moetool.methods.reduce import beside

        profile, folder = Profile.open(stats), Path(work) / "solved"
        for number, decision in decided.layers.items():
            mean = profile.layer(number).mean("out_sum")
            stored = mixture.source.tensor(mixture.pieces(number, 0)[BIAS].name)
            dtype = codec.torch_dtype(stored.dtype)
            constants = {
                beside.solved_name(number, e, BIAS): torch.from_numpy(mean[e]).to(dtype)
                for e in decision.constant
            }
            solve.save(folder, number, constants)
        return (beside.solved_source(folder),)

    def maker(self, writing: Writing) -> Constant:
        return Constant()


class Constant:
    """Plans experts of which only a bias is left."""

    def makes(self, decision: Decision, members: tuple[int, ...]) -> bool:
        return members[0] in decision.constant

    def make(self, build: Builder, cluster: Cluster, outs: Mapping[str, Piece]) -> None:
        for role, out in outs.items():
            solved = cluster.solved.get(role)
            if solved is not None:
                build.copy(solved, out)
            else:
                build.tasks.append(Task("zeros", (), (out,)))
