"""moetool upcycle: a dense checkpoint, or several fine-tunes of one, becomes a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Builder, Certificate, Decisions, Made, Settings
from moetool.methods.upcycle import assemble, carve, scale, site
from moetool.methods.upcycle.diversify import Diversify
from moetool.methods.upcycle.experts import Ffn, Layer, idle_width, write_moe
from moetool.methods.upcycle.route import Router
from moetool.methods.upcycle.targets import Conversion, Wish, candidates, choose, dense
from moetool.methods.upcycle.trunk import Trunk, is_ffn
from moetool.surgery import pair as pairing
from moetool.surgery import reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.plan import Plan
from moetool.surgery.reform import Wanted

CLUSTER_RESERVE = 260_000_000  # numpy, scipy and scikit-learn imported, measured


def option(default: Any, text: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Upcycle:
    """Turn a dense model into a mixture of experts that computes the same function (or say what it
    computes instead).

    Sparse upcycling: Komatsuzaki et al., arXiv 2212.05055. Virtual groups: He et al., arXiv
    2410.07524. Drop-Upcycling: arXiv 2502.19261. Branch-Train-MiX: arXiv 2403.07816. The identity
    behind the certificate is in methods/upcycle/scale.py.
    """

    experts: int = option(8, "routed experts in each MoE layer")
    top_k: int = option(2, "experts that run for a token")
    split: int = option(1, "cut each FFN into this many parts; experts = parts x replicas")
    layers: str = option("all", f"which layers get experts: {site.FORMS}")
    target: str = option("auto", "model type to write, or auto; with --layers none: same")
    layout: str = option(
        "auto", "per-expert or fused tensors; auto is per-expert wherever the family reads it"
    )
    router: str = option(
        "auto", "how the router starts: zero, normal:SIGMA, kaiming, uniform:SIGMA, group:SIGMA"
    )
    carve: str = option("contiguous", f"how --split chooses neurons: {carve.FORMS}")
    diversify: str = option(
        "none",
        "what makes copies differ: none, permute, noise:SIGMA, drop:RATIO[:reference], joined by +",
    )
    shared: bool = option(
        False,
        "keep the whole FFN as an always-on shared expert; routed experts start at zero output",
    )
    scale: str = option("auto", "factor on expert outputs; auto solves the coverage identity")
    trunk: str = option(
        "base", "everything but the FFNs, with --from: base, mean, weights:a,b,... or interp:x"
    )
    expert_map: str = option(
        "", "source of each expert (0 is SRC, 1 the first --from), for example 0,1,1,2"
    )

    def __post_init__(self) -> None:
        if self.experts < 1 or self.top_k < 1 or self.split < 1:
            raise UsageError(
                "--experts, --top-k and --split are at least 1",
                found=f"{self.experts}, {self.top_k}, {self.split}",
                hint="for example --experts 8 --top-k 2",
            )
        if self.top_k > self.experts:
            raise UsageError(
                "more experts run than there are",
                expected=f"--top-k at most {self.experts}",
                found=self.top_k,
                hint="raise --experts or lower --top-k",
            )
        if self.experts % self.split:
            raise UsageError(
                "--experts must be a multiple of --split",
                expected=f"a multiple of {self.split}",
                found=self.experts,
                hint=f"for example --experts {self.split * max(1, round(self.experts / self.split))}",
            )
        if self.layout not in ("auto", "per-expert", "fused"):
            raise UsageError(
                f"--layout {self.layout!r} is not known",
                expected="auto, per-expert or fused",
                hint="leave it out",
            )
        carve.parse(self.carve, self.split)
        Diversify.parse(self.diversify)
        Router.parse(self.router, self.split, self.top_k)

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Neuron orders of every MoE layer (as tables), and how far apart the sources' trunks are."""
        assemble.check_alike(sources)
        chosen = self._conversion(sources[0])
        kind, matrix = carve.parse(self.carve, self.split)
        tables = {}
        needed = _check_memory(Ffn.read(sources[0], chosen, 0), settings) if kind == "kmeans" else 0
        for layer in (
            site.parse(self.layers, chosen.source.field("layers", chosen.config))
            if kind != "contiguous"
            else ()
        ):
            ffn = Ffn.read(sources[0], chosen, layer)
            order = carve.order(
                kind,
                ffn.width,
                self.split,
                settings.seed,
                f"layer{layer}",
                lambda ffn=ffn: _matrix(sources[0], ffn, matrix),
            )
            tables[f"layer{layer}"] = order or []
        report: dict[str, Any] = {}
        if len(sources) > 1:
            names = [n for n in sources[0].tensors if not is_ffn(chosen, n)]
            report["trunks"] = assemble.trunk_report(sources, names)
        return Decisions(tables, report, needed)

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """The plan and its certificate; every refusal that needs only headers happens here."""
        base, chosen = sources[0], self._conversion(sources[0])
        if chosen.stays_dense:
            return self._plan_dense(sources, chosen, decisions, settings)
        count = chosen.source.field("layers", chosen.config)
        layers = site.parse(self.layers, count)
        origin = assemble.expert_map(self.expert_map, self.experts, self.split, len(sources))
        weights = assemble.trunk_weights(self.trunk, len(sources))
        diversify, router = (
            Diversify.parse(self.diversify),
            Router.parse(self.router, self.split, self.top_k),
        )
        mixed = len(set(origin)) > 1 or weights is not None or origin[0] != 0
        certificate = scale.solve(
            experts=self.experts,
            top_k=self.top_k,
            split=self.split,
            router_law=router.law,
            router_repeat=router.repeat,
            target=chosen.target,
            shared=self.shared,
            changed=diversify.changes_function,
            assembled=mixed,
            asked=self.scale,
        )
        ffn = Ffn.read(base, chosen, layers[0])
        folded = any(p.op != "copy" for pieces in chosen.pair.tensors.values() for p in pieces)
        certificate = scale.rounded(certificate, ffn.dtype, folded)
        config = self._config(
            chosen, base, layers, ffn, certificate.scale if certificate.place == "config" else 1.0
        )
        build, trunk = Builder(), Trunk.of(sources, chosen, weights)
        trunk.write(build, "before")
        for layer in range(count):
            trunk.write(build, layer)
            if layer not in layers:
                trunk.write_ffn(build, layer)
                continue
            write_moe(
                build,
                sources,
                chosen,
                Layer(
                    number=layer,
                    experts=self.experts,
                    split=self.split,
                    origin=origin,
                    order=f"layer{layer}" if decisions.tables.get(f"layer{layer}") else None,
                    diversify=diversify,
                    router=router,
                    scale=certificate.scale if certificate.place == "down_proj" else 1.0,
                    shared=self.shared,
                    fused=self._fused(chosen),
                    seed=settings.seed,
                ),
            )
        trunk.write(build, "after")
        plan = reform.plan(
            sources,
            Wanted(config.value, build.targets, build.tasks, trunk.dropped),
            max_shard=settings.max_shard,
            tables=decisions.tables,
        )
        facts = self._facts(plan, chosen, layers, origin, ffn)
        return Made(plan, certificate, plan.config, config.dropped, facts | decisions.report)

    def _plan_dense(
        self,
        sources: Sequence[Checkpoint],
        chosen: Conversion,
        decisions: Decisions,
        settings: Settings,
    ) -> Made:
        """No experts: the trunks, FFNs included, combined tensor by tensor (UnIVAL, arXiv
        2307.16184).
        """
        weights = assemble.trunk_weights(self.trunk, len(sources))
        build, trunk = Builder(), Trunk.of(sources, chosen, weights)
        for place in ("before", *range(chosen.source.field("layers", chosen.config) or 0), "after"):
            trunk.write(build, place)
        plan = reform.plan(
            sources,
            Wanted(sources[0].config, build.targets, build.tasks, trunk.dropped),
            max_shard=settings.max_shard,
        )
        same = weights is None or weights == [1.0] + [0.0] * (len(sources) - 1)
        certificate = (
            Certificate("exact", "a copy of the base")
            if same
            else Certificate(
                "none",
                "trunks of several models are mixed: there is no single function to keep",
                None,
            )
        )
        facts = {
            "source_type": chosen.source.model_type,
            "target_type": chosen.source.model_type,
            "layers": [],
            "experts": 0,
            "top_k": 0,
            "expert_width": 0,
            "layout": "dense",
            "parameters": plan.parameters,
            "active_parameters": plan.parameters,
            "expert_sources": [],
        }
        return Made(plan, certificate, plan.config, {}, facts | decisions.report)

    def _conversion(self, base: Checkpoint) -> Conversion:
        if (self.layers == "none") != (self.target == "same"):
            raise UsageError(
                "--layers none and --target same belong together: no experts, only trunks mixed",
                found=f"--layers {self.layers} --target {self.target}",
                hint="use both or neither",
            )
        if self.layers == "none":
            return dense(base)
        first = candidates(base)[0]
        count = first.source.field("layers", first.config)
        width = Ffn.read(base, first, 0).width
        if width % self.split:
            raise UsageError(
                "the FFN cannot be cut into equal parts",
                expected=f"a divisor of its width {width}",
                found=f"--split {self.split}",
                hint=f"try --split {_near_divisor(width, self.split)}",
            )
        if width // self.split % 8:
            raise UsageError(
                "expert width must be a multiple of 8",
                expected=f"{width} / split divisible by 8",
                found=f"{width // self.split} at --split {self.split}",
                hint=f"transformers' grouped kernels need it; try --split {_near_divisor(width // 8, self.split)}",
            )
        wish = Wish(
            self.target, self.layout, self.layers, self.shared, self.split, self.top_k, width, count
        )
        return choose(base, wish)

    def _fused(self, chosen: Conversion) -> bool:
        if self.layout != "auto":
            return self.layout == "fused"
        return not (chosen.target.per_expert() and chosen.target.experts.reads_per_expert)

    def _config(
        self,
        chosen: Conversion,
        base: Checkpoint,
        layers: tuple[int, ...],
        ffn: Ffn,
        routed_scale: float,
    ) -> pairing.Config:
        target, fields = chosen.target, chosen.target.fields
        expert_width = ffn.width // self.split
        decided: dict[str, Any] = {fields["experts"]: self.experts, fields["top_k"]: self.top_k}
        decided |= {
            alias: self.experts
            for alias, real in target.aliases.items()
            if real == fields["experts"] and alias in ("num_experts", "num_local_experts")
        }
        decided[fields.get("expert_width", fields.get("width", "intermediate_size"))] = expert_width
        if "expert_width" in fields and "width" in fields:
            decided[fields["width"]] = ffn.width
        if "routed_scale" in fields:
            decided[fields["routed_scale"]] = routed_scale
        decided |= (
            shared_fields(target, ffn.width, expert_width)
            if self.shared
            else shared_fields(target, 0, expert_width)
        )
        count = chosen.source.field("layers", chosen.config)
        decided |= target.overlay.sites.fields(layers, count, ffn.width)
        inner = pairing.map_config(chosen.pair, chosen.source, target, chosen.config, decided)
        if chosen.outer is None:
            return inner
        whole_config = {k: v for k, v in base.config.items() if k != "text_config"} | {
            "text_config": inner.value
        }
        return pairing.Config(
            whole_config, {f"text_config.{k}": v for k, v in inner.dropped.items()}
        )

    def _facts(
        self,
        plan: Plan,
        chosen: Conversion,
        layers: tuple[int, ...],
        origin: tuple[int, ...],
        ffn: Ffn,
    ) -> dict[str, Any]:
        expert = 3 * ffn.hidden * (ffn.width // self.split)
        idle = len(layers) * expert * (self.experts - self.top_k)
        return {
            "source_type": (chosen.outer or chosen.pair).source,
            "target_type": chosen.target.model_type,
            "layers": list(layers),
            "experts": self.experts,
            "top_k": self.top_k,
            "expert_width": ffn.width // self.split,
            "layout": "fused" if self._fused(chosen) else "per-expert",
            "parameters": plan.parameters,
            "active_parameters": plan.parameters - idle,
            "expert_sources": list(origin),
        }


def shared_fields(target: Any, width: int, expert_width: int) -> dict[str, Any]:
    """Config fields for a shared expert of this width (0 for none)."""
    rule = target.overlay.shared
    if rule is None:
        return {}
    if rule.count:
        return {rule.count: width // expert_width}
    return {rule.width: width or idle_width(rule, expert_width)} if rule.width else {}


def _near_divisor(width: int, near: int) -> int:
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - near), d))


def _check_memory(ffn: Ffn, settings: Settings) -> int:
    """Peak bytes of clustering one matrix: scikit-learn itself, the rows in float64 and twice in
    float32 (measured); refused when --memory is less.
    """
    needed = CLUSTER_RESERVE + 20 * ffn.width * ffn.hidden
    if settings.memory is not None and needed > settings.memory:
        raise MoetoolError(
            "clustering does not fit into --memory",
            expected=f"at least {needed:,} bytes",
            found=f"{settings.memory:,} bytes",
            hint="raise --memory, or use --carve random",
        )
    return needed


def _matrix(source: Checkpoint, ffn: Ffn, which: str) -> Any:
    """Gate or up of an FFN as float64 [width, hidden]."""
    return source.numbers(getattr(ffn, which))
