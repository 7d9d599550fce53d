"""moetool prune: a mixture of experts with fewer experts. Kept experts move byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Builder, Certificate, Decisions, Made, Settings
from moetool.methods.prune import criterion, stun
from moetool.methods.prune.criterion import Criterion
from moetool.methods.reduce import facts
from moetool.methods.reduce.cut import Cluster, Cut, solved_name
from moetool.methods.reduce.decide import (
    Job,
    Reduction,
    option,
    parts_source,
    refuse_quantized,
    stats_source,
)
from moetool.methods.reduce.decision import Decided, Layer
from moetool.methods.reduce.view import View
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.spec import Piece


@dataclass(frozen=True)
class Prune(Reduction):
    """Remove experts: by what they do on text (reap, frequency, gate-mass, ean, easy-ep, naee,
    mone, stun), or by their router rows alone.

    Papers and formulas stand in the file of each method, moetool/methods/prune/NAME.py.
    """

    method: str = option(
        "auto",
        "auto (reap with text, router-distance without), or one of: easy-ep, ean, frequency, gate-mass, mone, naee, random, reap, router-distance, stun",
    )
    total_sparsity: float = option(
        0.0, "with --method stun: share of all expert weights that are gone or zero at the end"
    )

    def __post_init__(self) -> None:
        self._check()
        if self.method != "auto":
            criterion.get(self.method)
        if (self.total_sparsity > 0) != (self.method == "stun"):
            raise UsageError(
                "--total-sparsity and --method stun belong together",
                expected="for example --method stun --ratio 0.2 --total-sparsity 0.4",
                found=f"--method {self.method} --total-sparsity {self.total_sparsity:g}",
                hint="use both or neither",
            )
        if self.method == "stun" and not self.ratio < self.total_sparsity < 1.0:
            raise UsageError(
                "the total sparsity must lie above the share of experts removed",
                expected=f"{self.ratio:g} < --total-sparsity < 1",
                found=self.total_sparsity,
                hint="raise it, or lower --ratio",
            )
        if self.method == "stun" and (self.propagate or self.refit):
            raise UsageError(
                "--method stun works from one profile", hint="leave out --propagate and --refit"
            )

    @staticmethod
    def known() -> dict[str, Any]:
        """name -> class of every pruning method."""
        return dict(criterion.criteria())

    @property
    def name(self) -> str:
        """The method that `auto` stands for here."""
        return (
            self.method
            if self.method != "auto"
            else "reap"
            if self.calibrate or self.stats
            else "router-distance"
        )

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Which experts of each layer stay."""
        (source,) = sources
        how = criterion.get(self.name)
        job = Job(
            self,
            "prune",
            self.name,
            source,
            settings,
            choose=lambda view, count: _choose(how, view, count),
            text=how.text,
            sample=how.sample,
            weights=self.method == "stun",
            buffers=how.buffers,
            rebuild=lambda view, layer, block, number: (block.with_experts(layer.leads), {}),
            scores=how.score if type(how).score is not Criterion.score else None,
        )
        job.facts["router"] = "rows of the kept experts"
        if how.constant:
            _check_constants(job.mixture)
        if how.text or self.refit or self.propagate:
            refuse_quantized(
                job.mixture, f"--method {self.name}" if how.text else "--refit and --propagate"
            )
        if isinstance(how, stun.Stun):
            job.finish = lambda layers, view: self._spread(how, layers, view)
        decisions = job.run()
        decided = Decided.from_json(decisions.chosen)
        if how.constant or any(layer.sparsity for layer in decided.layers.values()):
            return replace(decisions, extra=self._extra(job, decided))
        return decisions

    def _spread(
        self, how: stun.Stun, layers: dict[int, Layer], view: Callable[[int], View]
    ) -> dict[int, Layer]:
        ratio = 1.0 - sum(layer.count for layer in layers.values()) / sum(
            view(n).experts for n in layers
        )
        share = stun.shares({n: how.outliers(view(n)) for n in layers}, ratio, self.total_sparsity)
        return {n: replace(layer, sparsity=share[n]) for n, layer in layers.items()}

    def _extra(self, job: Job, decided: Decided) -> tuple[Checkpoint, ...]:
        """Statistics that the plan reads: input energies for Wanda, or the constants of MoNE."""
        from pathlib import Path

        from moetool.forward.stats import Profile

        profile = Profile.open(self.stats or job.work / "stats")
        if any(layer.constant for layer in decided.layers.values()):
            import torch

            from moetool.kernels import codec
            from moetool.methods.reduce.inwalk import _save

            folder = Path(job.work) / "solved"
            for number, layer in decided.layers.items():
                mean = profile.layer(number).mean("out_sum")
                dtype = codec.torch_dtype(
                    job.source.tensor(job.mixture.pieces(number, 0)["down_bias"].name).dtype
                )
                _save(
                    folder / f"solved-{number:05d}.safetensors",
                    {
                        solved_name(number, e, "down_bias"): torch.from_numpy(mean[e]).to(dtype)
                        for e in layer.constant
                    },
                )
            return (parts_source(folder, "solved-*.safetensors"),)
        return (stats_source(profile.folder),)

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """Copies, but for what --refit solved, Wanda zeroed, or MoNE made constant."""
        mixture = Mixture.of(sources[0])
        decided = Decided.from_json(decisions.chosen)
        cut = Cut(
            mixture,
            decided,
            layout=self.layout,
            router="centroid",
            extra=decisions.extra,
            sparse=_sparse(mixture, decided, decisions.extra),
        )
        plan, config = cut.plan(settings.max_shard, decisions.tables)
        return Made(
            plan,
            certificate(mixture, decided, bool(decisions.extra)),
            config,
            {},
            facts.of(mixture, decided, plan, self.layout, decisions),
            tuple(decisions.report.get("warnings", ())),
            facts.files(decided),
        )


def _choose(how: Criterion, view: View, count: int) -> Layer:
    layer = how.decide(view, count)
    if not how.constant:
        return layer
    gone = sorted(set(range(view.experts)) - set(layer.leads))
    return Layer.keep(
        range(view.experts), scores=layer.scores, protected=layer.protected, constant=tuple(gone)
    )


def _check_constants(mixture: Mixture) -> None:
    if "down_bias" not in mixture.pieces(mixture.layers[0], 0):
        raise MoetoolError(
            f"the experts of {mixture.layout.model_type} cannot be constants: their down_proj has no bias",
            expected="gpt_oss or openai_privacy_filter",
            hint="--method reap removes experts instead",
        )


def _sparse(mixture: Mixture, decided: Decided, extra: Sequence[Checkpoint]) -> Any:
    """How a kept expert is planned when part of its weights are zeroed, or None."""
    if not any(layer.sparsity for layer in decided.layers.values()):
        return None

    def make(build: Builder, cluster: Cluster, outs: Mapping[str, Piece]) -> None:
        layer, expert = cluster.layer, cluster.members[0]
        roles = list(outs)
        energies = [
            Piece(
                f"{layer}.{name}",
                (extra[0].tensor(f"{layer}.{name}").shape[1],),
                expert * extra[0].tensor(f"{layer}.{name}").shape[1],
                1,
            )
            for name in ("in_sq", "mid_sq")
        ]
        build.task(
            "wanda",
            [*(cluster.pieces[0][r] for r in roles), *energies],
            list(outs.values()),
            roles=",".join(roles),
            form=cluster.form,
            share=decided.layers[layer].sparsity,
        )

    return make


def certificate(mixture: Mixture, decided: Decided, solved: bool) -> Certificate:
    """A reduced model is another function; nothing removed is the same one."""
    if (
        all(
            layer.count == mixture.experts and not layer.constant and not layer.sparsity
            for layer in decided.layers.values()
        )
        and not solved
    ):
        return Certificate("exact", "nothing was removed: a copy")
    return Certificate(
        "none",
        "experts were removed: another function, by how much `moetool eval --reference` measures",
        None,
    )
