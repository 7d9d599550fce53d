"""Structured, then unstructured: fewer experts, and zeros in those that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moetool.errors import UsageError
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.prune.router_distance import RouterDistance
from moetool.methods.reduce.way import Needs
from moetool.methods.reduce.writing import Writing
from moetool.surgery.spec import Piece

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.methods.contract import Builder
    from moetool.methods.reduce.decided import Decided
    from moetool.methods.reduce.decision import Decision
    from moetool.methods.reduce.view import View
    from moetool.methods.reduce.writing import Cluster
    from moetool.surgery.checkpoint import Checkpoint

OUTLIER = 5.0  # times the layer's mean score: outlier weights in each of OWL's own commands
SPREAD = 0.08  # how far a layer's share may lie from the mean (OWL's lambda)


@dataclass(frozen=True)
class Sparsity:
    """What STUN alone is told."""

    total_sparsity: float = option(
        0.0,
        "share of all expert weights that are gone or zero at the end",
        WHAT,
        unit="share",
        metavar="SHARE",
    )


class Stun(RouterDistance):
    """STUN (arXiv 2409.06211): router-distance clusters down to --ratio, then Wanda (arXiv
    2306.11695) inside the kept experts until --total-sparsity of all expert weights is gone or
    zero, spread over layers by OWL (arXiv 2310.05175): layers with more outliers keep more.
    """

    name = "stun"
    auto = ""
    one_profile, solvable = True, False
    needs = Needs(text=True, weights=True)
    writes = frozenset({"sparsity"})
    Options = Sparsity

    def told(self) -> None:
        """Refuse options that do not go together."""
        if not self.own.total_sparsity:
            raise UsageError(
                "--total-sparsity and --method stun belong together",
                expected="for example --method stun --ratio 0.2 --total-sparsity 0.4",
                found="--method stun alone",
                hint="use both or neither",
            )
        if not self.options.ratio < self.own.total_sparsity < 1.0:
            raise UsageError(
                "the total sparsity must lie above the share of experts removed",
                expected=f"{self.options.ratio:g} < --total-sparsity < 1",
                found=self.own.total_sparsity,
                hint="raise it, or lower --ratio",
            )
        self.check_walk()

    def finish(
        self, layers: dict[int, Decision], view: Callable[[int], View]
    ) -> dict[int, Decision]:
        """Each layer's share of zeros, when all are known."""
        left = sum(decision.count for decision in layers.values())
        ratio = 1.0 - left / sum(view(n).experts for n in layers)
        share = shares({n: outliers(view(n)) for n in layers}, ratio, self.own.total_sparsity)
        return {n: replace(decision, sparsity=share[n]) for n, decision in layers.items()}

    @classmethod
    def claims(cls, decided: Decided) -> bool:
        return any(decision.sparsity for decision in decided.layers.values())

    def maker(self, writing: Writing) -> Wanda:
        return Wanda(writing.decided, writing.extra)


class Wanda:
    """Plans experts of which a share of weights is zeroed."""

    def __init__(self, decided: Decided, extra: tuple[Checkpoint, ...]) -> None:
        self.decided, self.extra = decided, extra

    def makes(self, decision: Decision, members: tuple[int, ...]) -> bool:
        return bool(decision.sparsity)

    def make(self, build: Builder, cluster: Cluster, outs: Mapping[str, Piece]) -> None:
        layer, expert, roles = cluster.layer, cluster.members[0], list(outs)
        seen = [self.extra[0].tensor(f"{layer}.{name}") for name in ("in_sq", "mid_sq")]
        energies = [Piece(t.name, (t.shape[1],), expert * t.shape[1], 1) for t in seen]
        build.task(
            "wanda",
            [*(cluster.pieces[0][r] for r in roles), *energies],
            list(outs.values()),
            roles=",".join(roles),
            form=cluster.form,
            share=self.decided.layers[layer].sparsity,
        )


def outliers(view: View) -> float:
    """Share of a layer's weights whose |w| sqrt(input energy) is above OUTLIER times the mean of
    all of the layer.
    """
    total = count = 0.0
    for score in _scores(view):
        total, count = total + float(score.double().sum()), count + score.numel()
    bar = OUTLIER * total / count
    return sum(int((score > bar).sum()) for score in _scores(view)) / count


def _scores(view: View) -> Iterator[Tensor]:
    """Wanda's score of every weight, a matrix of an expert at a time."""
    import numpy as np
    import torch

    experts = view.block.experts
    for e in range(view.experts):
        for matrix, energy in (
            (experts.gate_up[e], view.seen.in_sq[e]),
            (experts.down[e], view.seen.mid_sq[e]),
        ):
            scale = torch.from_numpy(np.sqrt(energy)).float()[None, :].to(matrix.device)
            yield matrix.float().abs() * scale


def shares(outliers: dict[int, float], ratio: float, total: float) -> dict[int, float]:
    """{layer: share of the kept experts' weights to zero} so that, with `ratio` of experts gone,
    `total` of all weights are gone or zero.
    """
    base = 1.0 - (1.0 - total) / (1.0 - ratio)
    low, high = min(outliers.values()), max(outliers.values())
    if high == low:
        return dict.fromkeys(outliers, base)
    spread = {n: (v - low) / (high - low) * 2 * SPREAD for n, v in outliers.items()}
    mean = sum(spread.values()) / len(spread)
    return {n: min(0.99, max(0.0, base - (v - mean))) for n, v in spread.items()}
