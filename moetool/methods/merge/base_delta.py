"""D2-MoE's form: one shared base and a low-rank difference for each expert; factored in moetool's
own form, or full matrices again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate, Decisions, Made, Settings
from moetool.methods.merge import group
from moetool.methods.reduce import facts
from moetool.methods.reduce.decide import Job
from moetool.methods.reduce.decision import Decided, Layer
from moetool.surgery import reform
from moetool.surgery.experts import Mixture
from moetool.surgery.forms.factored import Factored, wrapped
from moetool.surgery.reform import Wanted
from moetool.surgery.spec import Piece, Target, whole

if TYPE_CHECKING:
    from moetool.methods.merge.method import Merge

MATRICES = ("gate", "up", "down")


def decide(method: Merge, job: Job) -> Decisions:
    """Every expert stays; the decision is the weight of each in the base."""
    if method.layout != "uniform" or method.budget != "uniform" or method.refit or method.propagate:
        raise UsageError(
            "base-delta keeps every expert: --layout, --budget, --refit and --propagate do not apply",
            hint="leave them out",
        )
    _rank(method, job.mixture)
    job.choose = lambda view, count: Layer.keep(
        range(view.experts),
        scores=tuple(float(s) for s in group.saliency(view, method.part("weigh"))),
        protected=view.protected,
    )
    job.facts |= {
        "router": "unchanged",
        "form": method.form,
        "rank": {m: _rank(method, job.mixture)[m] for m in MATRICES},
        "saved_share": method.ratio,
    }
    return job.run()


def _rank(method: Merge, mixture: Mixture) -> dict[str, int]:
    """Rank of each matrix's differences, so that base and factors together are 1 - ratio of what
    all experts were.
    """
    pieces = mixture.pieces(mixture.layers[0], 0)
    if not set(MATRICES) <= set(pieces):
        raise UsageError(
            f"base-delta needs gate, up and down as single tensors, and {mixture.layout.model_type} stacks them",
            hint="convert them first: `moetool convert-layout SRC OUT --to per-expert`, or use --method hc-smoe",
        )
    ranks = {}
    for matrix in MATRICES:
        rows, columns = pieces[matrix].shape
        ranks[matrix] = int(
            ((1.0 - method.ratio) * mixture.experts - 1.0)
            * rows
            * columns
            / (mixture.experts * (rows + columns))
        )
        if ranks[matrix] < 1:
            raise UsageError(
                "nothing is left for the differences between experts",
                expected=f"--ratio below {1 - 1 / mixture.experts:.2f}",
                found=method.ratio,
                hint="lower --ratio, or prune",
            )
        ranks[matrix] = min(ranks[matrix], rows, columns)
    return ranks


def plan(
    method: Merge, mixture: Mixture, decided: Decided, decisions: Decisions, settings: Settings
) -> Made:
    """One task a layer and matrix; everything else is copied."""
    source, build, ranks = mixture.source, Builder(), _rank(method, mixture)
    factored, done = method.form == "factored", set()
    for name in sorted(
        source.tensors, key=lambda n: (source.tensors[n].file, source.tensors[n].start)
    ):
        counted = mixture.counted.get(name)
        if counted is None or counted.kind != "expert" or counted.layer not in mixture.layers:
            stored = source.tensors[name]
            build.copy(whole(stored), whole(build.target(name, stored.dtype, stored.shape)))
        elif counted.layer not in done:
            done.add(counted.layer)
            for matrix in MATRICES:
                _matrix(
                    build,
                    mixture,
                    counted.layer,
                    matrix,
                    decided,
                    ranks[matrix],
                    factored,
                    decisions,
                )
    config = source.config if not factored else wrapped(source.config, ranks)
    made = reform.plan(
        [source, *decisions.extra],
        Wanted(config, build.targets, build.tasks, {}),
        max_shard=settings.max_shard,
        form="full" if factored else "auto",
    )
    level = Certificate(
        "none",
        "each expert became a base and a low-rank difference: another function, by how much `moetool eval --reference` measures",
        None,
    )
    report = facts.of(mixture, decided, made, "uniform", decisions) | {"counts": method.form}
    return Made(
        made,
        level,
        made.config,
        {},
        report,
        tuple(decisions.report.get("warnings", ())),
        facts.files(decided),
    )


def _matrix(
    build: Builder,
    mixture: Mixture,
    layer: int,
    matrix: str,
    decided: Decided,
    rank: int,
    factored: bool,
    decisions: Decisions,
) -> None:
    pieces = [mixture.pieces(layer, e)[matrix] for e in range(mixture.experts)]
    dtype, shape = mixture.source.tensor(pieces[0].name).dtype, pieces[0].shape
    scores = decided.layers[layer].scores
    total = sum(scores) or float(len(pieces))
    weights = [
        (s / total if sum(scores) else 1.0 / len(pieces)) for s in (scores or [1.0] * len(pieces))
    ]
    inputs = [*pieces, *_covariance(mixture, layer, matrix, decisions)]
    if not factored:
        outs = [whole(build.target(p.name, dtype, shape)) for p in pieces]
    else:
        parts = [Factored().parts(Target(p.name, dtype, shape), {"rank": rank}) for p in pieces]
        own = [part for _, *factors in parts for part in factors]
        outs = [whole(build.target(t.name, t.dtype, t.shape)) for t in (parts[0][0], *own)]
    build.task(
        "base_delta",
        inputs,
        outs,
        members=len(pieces),
        weights=weights,
        rank=rank,
        factored=factored or None,
    )


def _covariance(mixture: Mixture, layer: int, matrix: str, decisions: Decisions) -> list[Piece]:
    """The layer's input covariance for gate and up; each expert's own for down; none without
    statistics.
    """
    if not decisions.extra:
        return []
    stats = decisions.extra[0]
    if matrix != "down":
        seen = stats.tensor(f"{layer}.in_cov")
        return [Piece(seen.name, seen.shape, 0, 1)]
    between = stats.tensor(f"{layer}.mid_cov")
    size = between.shape[1] * between.shape[2]
    return [Piece(between.name, between.shape[1:], e * size, 1) for e in range(mixture.experts)]
