"""D2-MoE: one shared base and a low-rank difference for each expert; factored in moetool's own
form, or full matrices again. Whole here: what is decided, how it is planned, what is said of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moetool.data import JsonMapping, JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate, Line
from moetool.methods.merge.way import MergeParts, MergeWay
from moetool.methods.reduce.decision import Decision
from moetool.methods.reduce.writing import Planned, Writing
from moetool.surgery import reform
from moetool.surgery.forms.factored import Factored, wrapped
from moetool.surgery.plan import Outputs
from moetool.surgery.spec import Piece, Target, whole

if TYPE_CHECKING:
    from moetool.methods.reduce.view import View
    from moetool.surgery.experts import Mixture

MATRICES = ("gate", "up", "down")


class D2Moe(MergeWay):
    """D2-MoE (arXiv 2502.17298): every expert is one shared base (frequency-weighted mean) plus a
    low-rank difference, whitened as SVD-LLM does.

    The number of experts stays; --ratio is the share of expert weights saved, which sets the rank.
    --form factored stores it that way (moetool's own form, which stock loaders refuse); else
    full matrices are written, which load everywhere and save nothing.
    """

    name = "d2-moe"
    combines = "base-delta"
    parts = MergeParts("outputs", "average", "frequency", "base-delta", whiten=True)
    forms = (Factored.name,)
    solvable = False
    apart = "not to be compared: all experts stay, and only --form factored makes them smaller"

    def told(self) -> None:
        super().told()
        o = self.options
        if o.uneven not in ("auto", "uniform") or o.budget != "uniform" or o.refit or o.propagate:
            raise UsageError(
                "base-delta keeps every expert: --uneven, --budget, --refit and --propagate do not apply",
                hint="leave them out",
            )

    def check(self, mixture: Mixture) -> None:
        super().check(mixture)
        ranks(mixture, self.options.ratio)

    def notes(self, mixture: Mixture) -> list[str]:
        return []

    def choose(self, view: View, count: int) -> Decision:
        """Every expert stays; what is decided is the weight of each in the base."""
        from moetool.methods.merge.parts import group

        need = group.saliency(view, self.chosen.weigh)
        return Decision.keep(
            range(view.experts), scores=tuple(map(float, need)), protected=view.protected
        )

    def finish(self, layers: dict[int, Decision], view: Any) -> dict[int, Decision]:
        return layers

    def write(self, writing: Writing) -> Planned:
        """One task a layer and matrix; everything else is copied."""
        mixture, source = writing.mixture, writing.mixture.source
        form = self.options.form
        factors = _Factoring(writing, form in self.forms, self.options.ratio)
        done = set()
        order = sorted(source.tensors.values(), key=lambda t: (t.file, t.start))
        for stored in order:
            counted = mixture.counted.get(stored.name)
            if counted is None or counted.kind != "expert" or counted.layer not in mixture.layers:
                target = factors.build.target(stored.name, stored.dtype, stored.shape)
                factors.build.copy(whole(stored), whole(target))
            elif counted.layer not in done:
                done.add(counted.layer)
                for matrix in MATRICES:
                    factors.matrix(counted.layer, matrix)
        config = wrapped(source.config, factors.ranks) if factors.kept else source.config
        plan = reform.plan(
            [source, *writing.extra],
            Outputs(config, factors.build.targets, factors.build.tasks, {}),
            max_shard=writing.settings.max_shard,
            form="full" if factors.kept else form,
        )
        return Planned(plan, self.certificate(writing), self._stored)

    @property
    def _stored(self) -> str:
        """How the report calls what becomes of base and differences."""
        return self.options.form if self.options.form in self.forms else "materialised"

    def certificate(self, writing: Writing) -> Certificate:
        return Certificate(
            "none",
            "each expert became a base and a low-rank difference: another function, by how much `moetool eval --reference` measures",
            None,
        )

    def facts(self, mixture: Mixture) -> JsonObject:
        return {
            "router": "unchanged",
            "form": self._stored,
            "rank": ranks(mixture, self.options.ratio),
            "saved_share": self.options.ratio,
        }

    @classmethod
    def lines(cls, facts: JsonMapping) -> list[Line]:
        shown = ", ".join(f"{m} {r}" for m, r in facts["rank"].items())
        saved = f"{facts['saved_share']:.0%} of expert weights saved, ranks {shown}"
        return [Line("base + delta", f"{saved}, {facts['form']}")]


def ranks(mixture: Mixture, ratio: float) -> dict[str, int]:
    """Rank of each matrix's differences, so that base and factors together are 1 - ratio of what
    all experts were.
    """
    pieces = mixture.pieces(mixture.layers[0], 0)
    if not set(MATRICES) <= set(pieces):
        raise UsageError(
            f"base-delta needs gate, up and down as single tensors, and {mixture.layout.model_type} stacks them",
            hint="convert them first: `moetool convert-layout SRC OUT --to per-expert`, or use --method hc-smoe",
        )
    return {m: _rank(pieces[m].shape, mixture.experts, ratio) for m in MATRICES}


def _rank(shape: Sequence[int], experts: int, ratio: float) -> int:
    rows, columns = shape
    left = ((1.0 - ratio) * experts - 1.0) * rows * columns
    rank = int(left / (experts * (rows + columns)))
    if rank < 1:
        raise UsageError(
            "nothing is left for the differences between experts",
            expected=f"--ratio below {1 - 1 / experts:.2f}",
            found=ratio,
            hint="lower --ratio, or prune",
        )
    return min(rank, rows, columns)


class _Factoring:
    """Plans matrices as a base and factors; `kept`: they are stored so."""

    def __init__(self, writing: Writing, kept: bool, ratio: float) -> None:
        self.mixture, self.decided, self.extra = writing.mixture, writing.decided, writing.extra
        self.kept, self.ranks, self.build = kept, ranks(writing.mixture, ratio), Builder()

    def matrix(self, layer: int, matrix: str) -> None:
        """All experts' matrices of one kind: one task."""
        mixture = self.mixture
        pieces = [mixture.pieces(layer, e)[matrix] for e in range(mixture.experts)]
        self.build.task(
            "base_delta",
            [*pieces, *self._covariance(layer, matrix)],
            self._outputs(pieces, self.ranks[matrix]),
            members=len(pieces),
            weights=_weights(self.decided.layers[layer].scores, len(pieces)),
            rank=self.ranks[matrix],
            factored=self.kept or None,
        )

    def _outputs(self, pieces: Sequence[Piece], rank: int) -> list[Piece]:
        shape, dtype = pieces[0].shape, self.mixture.source.tensor(pieces[0].name).dtype
        target = self.build.target
        if not self.kept:
            return [whole(target(p.name, dtype, shape)) for p in pieces]
        parts = [Factored().parts(Target(p.name, dtype, shape), {"rank": rank}) for p in pieces]
        made = [parts[0][0]]
        for _, *factors in parts:
            made += factors
        return [whole(target(t.name, t.dtype, t.shape)) for t in made]

    def _covariance(self, layer: int, matrix: str) -> list[Piece]:
        """The layer's input covariance for gate and up; each expert's own for down; none without
        statistics.
        """
        from moetool.methods.merge.maker import covariances

        if not self.extra:
            return []
        seen, *between = covariances(self.extra, layer, range(self.mixture.experts))
        return between if matrix == "down" else [seen]


def _weights(scores: Sequence[float], experts: int) -> list[float]:
    """Shares of the base; alike where no score is known."""
    total = sum(scores)
    return [s / total for s in scores] if total else [1.0 / experts] * experts
