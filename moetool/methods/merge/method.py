"""moetool merge: clusters of experts become one expert each, and the checkpoint really gets
smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate, Decisions, Made, Settings
from moetool.methods.merge import align, base_delta, features, group, preset
from moetool.methods.reduce import facts
from moetool.methods.reduce.cut import ROUTERS, Cluster, Cut
from moetool.methods.reduce.decide import Job, Reduction, option, refuse_quantized
from moetool.methods.reduce.decision import Decided, Layer, order_key
from moetool.methods.reduce.view import View
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.spec import Piece

COMBINE = ("mean", "svd", "least-squares", "ties", "base-delta")
WEIGH = ("frequency", "saliency", "uniform")


@dataclass(frozen=True)
class Merge(Reduction):
    """Merge experts: clusters by outputs, router or weights; aligned; combined by mean, union SVD,
    least squares or TIES.

    --method names a published choice (moetool/methods/merge/NAME.py says which); every part can be
    chosen alone.
    """

    method: str = option(
        "auto",
        "auto (mergemoe with text, alike without), or one of: alike, d2-moe, hc-smoe, m-smoe, mergemoe, ream, sub-moe, sub-moe-whitened",
    )
    features: str = option(
        "auto",
        "what experts are compared by: outputs, cosine, mean-outputs, router, router-logits, outputs-and-logits, weights",
    )
    cluster: str = option("auto", "how: kmeans, average, complete, ward, dominant, ream")
    joint: str = option("auto", "layers clustered at once: 1 or 2")
    weigh: str = option("auto", "what weighs a cluster's members: frequency, saliency, uniform")
    align: str = option("auto", "neurons matched before averaging: none, weights, activations")
    combine: str = option(
        "auto",
        "mean, svd (truncated union SVD; untruncated it is the weighted mean), least-squares (mean, then --refit), ties, base-delta",
    )
    router: str = option(
        "auto",
        "a cluster's router row: centroid (its lead's), mean, logsumexp (where the bias is part of the logits)",
    )
    rank_energy: float = option(
        0.95, "share of the singular values' energy that svd keeps; 1 keeps all"
    )
    whiten: str = option("auto", "true or false: svd in the space of whitened inputs")
    density: float = option(0.2, "share of differences that ties keeps")
    form: str = option("materialised", "base-delta: materialised or factored")

    def __post_init__(self) -> None:
        self._check()
        if self.method != "auto":
            preset.get(self.method)
        for name, known in (
            ("features", features.KINDS),
            ("cluster", group.KINDS),
            ("joint", ("1", "2")),
            ("weigh", WEIGH),
            ("align", align.KINDS),
            ("combine", COMBINE),
            ("router", ROUTERS),
            ("whiten", ("true", "false")),
            ("form", ("materialised", "factored")),
        ):
            value = getattr(self, name)
            if value not in known and not (value == "auto" and name != "form"):
                raise UsageError(
                    f"--{name} {value!r} is not known",
                    expected=", ".join(known),
                    hint="leave it out",
                )
        if not 0.0 < self.rank_energy <= 1.0 or not 0.0 < self.density <= 1.0:
            raise UsageError(
                "--rank-energy and --density lie above 0 and at most at 1",
                found=f"{self.rank_energy:g}, {self.density:g}",
                hint="for example --rank-energy 0.95",
            )

    @staticmethod
    def known() -> dict[str, Any]:
        """name -> class of every merging method."""
        return dict(preset.presets())

    @property
    def name(self) -> str:
        """The method that `auto` stands for here."""
        return (
            self.method
            if self.method != "auto"
            else "mergemoe"
            if self.calibrate or self.stats
            else "alike"
        )

    def part(self, name: str) -> str:
        """An option's value, the method's own where it was left on auto."""
        value = str(getattr(self, name))
        return (
            value
            if value != "auto"
            else preset.get(self.name).choices.get(
                name, {"joint": "1", "whiten": "false"}.get(name, "")
            )
        )

    @property
    def needs_text(self) -> bool:
        text = (
            self.part("features") in features.SAMPLED
            or self.part("weigh") != "uniform"
            or self.part("align") == "activations"
        )
        return (
            text
            or self.part("cluster") in ("dominant", "ream")
            or self.part("combine") == "least-squares"
            or self.part("whiten") == "true"
        )

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Clusters, leads, weights and neuron orders of every layer."""
        (source,) = sources
        chosen = replace(self, refit=True) if self.part("combine") == "least-squares" else self
        job = Job(
            chosen,
            "merge",
            self.name,
            source,
            settings,
            choose=self._choose,
            text=self.needs_text,
            sample=self.sample if self._samples else 0,
            dense=self.part("features") in features.DENSE,
            covariance=self.part("whiten") == "true",
            weights=self.part("features") == "weights" or self.part("align") != "none",
            rebuild=self._rebuild,
        )
        refuse_quantized(job.mixture, "merging")
        self._check_router(job.mixture)
        if self.part("combine") == "base-delta":
            return base_delta.decide(self, job)
        if self.part("joint") == "2" and not job.walks:
            job.finish = lambda layers, view: self._jointly(job, layers, view)
        elif self.part("joint") == "2":
            job.warnings.append(
                "layers were clustered one by one: inside a walk (--propagate, --refit) the layer above is not there yet"
            )
        job.facts["router"] = self.part("router")
        job.facts["parts"] = {
            n: self.part(n)
            for n in ("features", "cluster", "joint", "weigh", "align", "combine", "whiten")
        }
        return job.run()

    @property
    def _samples(self) -> bool:
        return (
            self.part("features") in features.SAMPLED
            or self.part("align") == "activations"
            or self.part("joint") == "2"
        )

    def _check_router(self, mixture: Mixture) -> None:
        if self.part("router") == "logsumexp" and mixture.layout.overlay.law.get("bias") != "logit":
            raise UsageError(
                f"--router logsumexp needs a bias in the logits, and {mixture.layout.model_type} has none",
                expected="gpt_oss, openai_privacy_filter or kolibri1",
                hint="--router centroid or mean",
            )

    def _choose(self, view: View, count: int) -> Layer:
        layer = group.decide(
            view,
            count,
            kind=self.part("cluster"),
            points=features.points(self.part("features"), view),
            weigh=self.part("weigh"),
        )
        return replace(layer, orders=align.orders(self.part("align"), view, layer))

    def _jointly(self, job: Job, layers: dict[int, Layer], view: Any) -> dict[int, Layer]:
        """Pairs of consecutive MoE layers decided together; a lone last layer stays as it was
        decided.
        """
        if job.mixture.groups > 1:
            job.warnings.append(
                "layers were clustered one by one: a group-limited router fixes each group's number of experts"
            )
            return layers
        numbers = list(job.mixture.layers)
        for first, second in zip(numbers[0::2], numbers[1::2], strict=False):
            views = (view(first), view(second))
            layers[first], layers[second] = group.joint(
                views, (layers[first].count, layers[second].count), self.part("weigh")
            )
        return {
            n: replace(layer, orders=align.orders(self.part("align"), view(n), layer))
            for n, layer in layers.items()
        }

    def _rebuild(
        self, view: View, layer: Layer, block: Any, number: int
    ) -> tuple[Any, dict[str, Any]]:
        """The merged block, with the very values that the plan will write."""
        from moetool.methods.merge.rebuild import merged_block

        return merged_block(
            block, layer, self._how(), number, self.part("router"), view.stats, view.mixture
        ), {}

    def _how(self) -> dict[str, Any]:
        how = {"mean": "mean", "least-squares": "mean"}.get(
            self.part("combine"), self.part("combine")
        )
        return (
            {"how": how}
            | (
                {"energy": self.rank_energy}
                if how == "svd"
                else {"density": self.density}
                if how == "ties"
                else {}
            )
            | ({"whiten": True} if self.part("whiten") == "true" and how == "svd" else {})
        )

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """Singles are copied byte for byte; merged experts are one task each."""
        mixture = Mixture.of(sources[0])
        decided = Decided.from_json(decisions.chosen)
        if self.part("combine") == "base-delta":
            return base_delta.plan(self, mixture, decided, decisions, settings)
        cut = Cut(
            mixture,
            decided,
            layout=self.layout,
            router=self.part("router"),
            maker=self._maker(decisions),
            extra=decisions.extra,
        )
        plan, config = cut.plan(settings.max_shard, decisions.tables)
        return Made(
            plan,
            _certificate(mixture, decided),
            config,
            {},
            facts.of(mixture, decided, plan, self.layout, decisions),
            tuple(decisions.report.get("warnings", ())),
            facts.files(decided),
        )

    def _maker(self, decisions: Decisions) -> Any:
        how = self._how()
        whitened = how.pop("whiten", False)

        def make(build: Builder, cluster: Cluster, outs: Mapping[str, Piece]) -> None:
            roles = [r for r in cluster.pieces[0] if r in outs]
            every = list(cluster.pieces[0])
            inputs = [p[r] for p in cluster.pieces for r in every]
            orders = [None, *(order_key(cluster.layer, e) for e in cluster.members[1:])]
            aligned = orders if any(k in decisions.tables for k in orders if k) else None
            if whitened:
                inputs += _covariances(decisions.extra[0], cluster)
            build.task(
                "merge",
                inputs,
                [outs[r] for r in roles],
                members=len(cluster.members),
                weights=list(cluster.weights),
                roles=",".join(every),
                made=",".join(roles),
                form=cluster.form,
                align=aligned,
                **how,
            )

        return make


def _covariances(stats: Checkpoint, cluster: Cluster) -> list[Piece]:
    """Inputs of gate and up (the layer's), then of each member's down."""
    seen = stats.tensor(f"{cluster.layer}.in_cov")
    between = stats.tensor(f"{cluster.layer}.mid_cov")
    size = between.shape[1] * between.shape[2]
    return [
        Piece(seen.name, seen.shape, 0, 1),
        *(Piece(between.name, between.shape[1:], e * size, 1) for e in cluster.members),
    ]


def _certificate(mixture: Mixture, decided: Decided) -> Certificate:
    if all(layer.count == mixture.experts for layer in decided.layers.values()):
        return Certificate("exact", "nothing was merged: a copy")
    return Certificate(
        "none",
        "experts were merged: another function, by how much `moetool eval --reference` measures",
        None,
    )
