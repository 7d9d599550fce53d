"""moetool upcycle: a dense checkpoint, or several fine-tunes of one, becomes a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.methods import site
from moetool.methods.contract import (
    Builder,
    Certificate,
    Decisions,
    Line,
    Made,
    ModelFacts,
    Settings,
    Summary,
    left_out,
)
from moetool.methods.field import Value
from moetool.methods.several import Several, told
from moetool.methods.upcycle import assemble, carve, growing, own, scale
from moetool.methods.upcycle.config import Shape, config_of
from moetool.methods.upcycle.diversify import Diversify
from moetool.methods.upcycle.experts import Ffn, Layer, write_moe
from moetool.methods.upcycle.growing import Growing
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.methods.upcycle.route import Router
from moetool.methods.upcycle.targets import Conversion, Spelling, Wish, candidates, choose, dense
from moetool.methods.upcycle.trunk import Trunk, is_ffn
from moetool.surgery import clients, reform, spellings
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.clients import Judged
from moetool.surgery.family import filled
from moetool.surgery.plan import Outputs, Plan

SHOWN = 12  # lines of what was left out, on the screen


@dataclass(frozen=True)
class Reading:
    """The options, read for one model: what each expert is, and where."""

    layers: tuple[int, ...]
    origin: tuple[int, ...]  # source of each expert
    weights: list[float] | None  # of the trunks; None: the first one's
    diversify: Diversify
    router: Router
    ffn: Ffn  # the first one that becomes experts
    fused: bool

    @property
    def assembled(self) -> bool:
        """Whether more than the base has a part in it."""
        return len(set(self.origin)) > 1 or self.weights is not None or self.origin[0] != 0


class Upcycle(Several):
    """Turn a dense checkpoint, or several fine-tunes of one, into a mixture of experts.

    The default keeps the function exactly: 8 copies of each FFN, 2 run for a token, their weights
    sum to one. Where an output computes another function, its certificate says so.

    Sparse upcycling: Komatsuzaki et al., arXiv 2212.05055. Virtual groups: He et al., arXiv
    2410.07524. Drop-Upcycling: arXiv 2502.19261. Branch-Train-MiX: arXiv 2403.07816.
    """

    Options = Growing
    Base = ExpertKind
    verb: ClassVar[str] = "upcycle"
    chooser: ClassVar[str] = "form"
    several = "a fine-tune that gives experts; repeat it"
    examples = (
        "moetool upcycle demo my-moe",
        "moetool upcycle demo my-moe --experts 16 --split 4 --top-k 4",
        "moetool upcycle BASE my-moe --from CODE --from MATH --experts 3 --trunk mean",
        "moetool upcycle SRC my-moe --shared --diversify drop:0.5 --dry-run",
    )
    options: Growing
    lays = True
    way: ExpertKind

    def __init__(self, options: Growing, way: ExpertKind | None = None) -> None:
        super().__init__(options)
        self.way = way or ExpertKind(options)

    @property
    def reads_groups(self) -> bool:  # type: ignore[override]
        """Whether SRC may have groups: they get one more, of moetool's own."""
        return self.way.grows

    @classmethod
    def ways(cls) -> Mapping[str, type[ExpertKind]]:
        return ExpertKind.known()

    @classmethod
    def axes(cls) -> Mapping[str, Mapping[str, type[Any]]]:
        return growing.axes()

    @classmethod
    def named(cls, options: Growing) -> type[ExpertKind]:
        """The kind of experts that is meant; `ExpertKind` itself where a stock class holds them."""
        return growing.kind(options)

    @classmethod
    def words(cls, options: Growing) -> Mapping[str, type[Any]]:
        return growing.route(options)

    @classmethod
    def make(cls, values: Mapping[str, object]) -> Upcycle:
        way = growing.way(cls.split(values))
        way.told()
        return cls(cast("Growing", way.verb), way)

    def recorded(self) -> dict[str, Value]:
        return super().recorded() | told(self.way.key.own) | told(self.way.combine.own)

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Neuron orders of every MoE layer (as tables), and how far apart the sources' trunks are."""
        if self.way.grows:
            return own.decide(self.way, sources, settings)
        assemble.check_alike(sources)
        assemble.check_trunk(self.options.trunk, len(sources))
        chosen = self._spelling(sources).conversion
        kind, _ = carve.parse(self.options.carve, self.options.split)
        needed = 0
        if kind == "kmeans":
            ffn = Ffn.read(sources[0], chosen, 0)
            needed = carve.check_memory(ffn.width, ffn.hidden, settings.memory)
        report: JsonObject = {}
        if len(sources) > 1:
            names = [n for n in sources[0].tensors if not is_ffn(chosen, n)]
            report["trunks"] = assemble.trunk_report(sources, names)
        return Decisions(self._orders(sources[0], chosen, settings.seed), report, needed)

    def _orders(self, base: Checkpoint, chosen: Conversion, seed: int) -> dict[str, list[int]]:
        """The order of neurons in each layer that is cut; none where parts are contiguous."""
        kind, matrix = carve.parse(self.options.carve, self.options.split)
        if kind == "contiguous":
            return {}
        tables, copies = {}, -(-self.options.experts // self.options.split)
        for layer in site.parse(self.options.layers, chosen.source.field("layers", chosen.config)):
            ffn, name = Ffn.read(base, chosen, layer), f"layer{layer}"
            if kind == carve.SHUFFLED:
                tables[name] = carve.shuffled(ffn.width, copies, seed, name)
                continue
            order = carve.order(
                kind,
                ffn.width,
                self.options.split,
                seed,
                name,
                partial(_matrix, base, ffn, matrix),
            )
            tables[name] = order or []
        return tables

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """The plan and its certificate; every refusal that needs only headers happens here."""
        if self.way.grows:
            return own.plan(self.way, sources, decisions, settings)
        spelled = self._spelling(sources)
        chosen = spelled.conversion
        if chosen.stays_dense:
            return self._plan_dense(sources, chosen, decisions, settings)
        reading = self._reading(spelled, sources)
        certificate = self._certificate(chosen, reading)
        config = config_of(chosen, sources[0].config, self._shape(reading, certificate))
        build, trunk = Builder(), Trunk.of(sources, chosen, reading.weights)
        trunk.write(build, "before")
        for number in range(chosen.source.field("layers", chosen.config)):
            trunk.write(build, number)
            if number not in reading.layers:
                trunk.write_ffn(build, number)
                continue
            order = f"layer{number}" if decisions.tables.get(f"layer{number}") else None
            factor = certificate.scale if certificate.place == "down_proj" else 1.0
            layer = self._layer(reading, number, order, factor, settings.seed)
            write_moe(build, sources, chosen, layer)
        trunk.write(build, "after")
        wanted = Outputs(config.value, build.targets, build.tasks, trunk.dropped)
        plan = reform.plan(
            sources,
            wanted,
            max_shard=settings.max_shard,
            tables=decisions.tables,
            form=self.options.form,
        )
        facts = self._facts(plan, chosen, reading, decisions)
        told = tuple(reform.widened(sources, plan, self.options.form))
        return Made(plan, certificate, plan.config, config.dropped, facts, told)

    def _reading(self, spelled: Spelling, sources: Sequence[Checkpoint]) -> Reading:
        said, chosen = self.options, spelled.conversion
        layers = site.parse(said.layers, chosen.source.field("layers", chosen.config))
        return Reading(
            layers=layers,
            origin=assemble.expert_map(said.expert_map, said.experts, said.split, len(sources)),
            weights=assemble.trunk_weights(said.trunk, len(sources)),
            diversify=Diversify.parse(said.diversify),
            router=Router.parse(said.router, said.split, said.top_k, said.experts),
            ffn=Ffn.read(sources[0], chosen, layers[0]),
            fused=spelled.fused,
        )

    def _certificate(self, chosen: Conversion, reading: Reading) -> Certificate:
        said = self.options
        recipe = scale.Combination(
            experts=said.experts,
            top_k=said.top_k,
            split=said.split,
            router_law=reading.router.law,
            router_repeat=reading.router.repeat,
            shared=said.shared,
            changed=reading.diversify.changes_function,
            assembled=reading.assembled,
            asked=said.scale,
        )
        certificate = scale.solve(recipe, chosen.target)
        return scale.rounded(certificate, reading.ffn.dtype, chosen.pair.folds)

    def _shape(self, reading: Reading, certificate: Certificate) -> Shape:
        return Shape(
            layers=reading.layers,
            experts=self.options.experts,
            top_k=self.options.top_k,
            width=reading.ffn.width,
            expert_width=reading.ffn.width // self.options.split,
            shared=self.options.shared,
            routed_scale=certificate.scale if certificate.place == "config" else 1.0,
        )

    def _layer(
        self, reading: Reading, number: int, order: str | None, factor: float, seed: int
    ) -> Layer:
        return Layer(
            number=number,
            experts=self.options.experts,
            split=self.options.split,
            origin=reading.origin,
            order=order,
            diversify=reading.diversify,
            router=reading.router,
            scale=factor,
            shared=self.options.shared,
            fused=reading.fused,
            seed=seed,
            silent=self.options.silent,
        )

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
        weights = assemble.trunk_weights(self.options.trunk, len(sources))
        build, trunk = Builder(), Trunk.of(sources, chosen, weights)
        for place in ("before", *range(chosen.source.field("layers", chosen.config) or 0), "after"):
            trunk.write(build, place)
        wanted = Outputs(sources[0].config, build.targets, build.tasks, trunk.dropped)
        plan = reform.plan(sources, wanted, max_shard=settings.max_shard, form=self.options.form)
        same = weights is None or weights == [1.0] + [0.0] * (len(sources) - 1)
        mixed = "trunks of several models are mixed: there is no single function to keep"
        certificate = (
            Certificate("exact", "a copy of the base") if same else Certificate("none", mixed, None)
        )
        family, count = chosen.source.model_type, plan.parameters
        trunks = tuple(decisions.report.get("trunks", ()))
        facts = ModelFacts(family, family, (), 0, 0, 0, "dense", count, count, trunks=trunks)
        told = tuple(reform.widened(sources, plan, self.options.form))
        return Made(plan, certificate, plan.config, {}, facts, told)

    def _spelling(self, sources: Sequence[Checkpoint]) -> Spelling:
        said, base = self.options, sources[0]
        if (said.layers == "none") != (said.target == "same"):
            raise UsageError(
                "--layers none and --target same belong together: no experts, only trunks mixed",
                found=f"--layers {said.layers} --target {said.target}",
                hint="use both or neither",
            )
        if said.layers == "none":
            return Spelling(dense(base), fused=False)
        first = candidates(base)[0]
        width, count = Ffn.read(base, first, 0).width, first.source.field("layers", first.config)
        carve.check_width(width, said.split)
        wish = Wish(
            said.target,
            said.layout,
            said.layers,
            said.shared,
            said.split,
            said.top_k,
            width,
            count,
            said.named,
        )
        return choose(base, wish, partial(self._judged, sources))

    def _judged(self, sources: Sequence[Checkpoint], spelled: Spelling) -> tuple[Judged, ...]:
        """What clients make of the config and the names that would be written; nothing where they
        cannot be.
        """
        chosen = spelled.conversion
        reading = self._reading(spelled, sources)
        shape = self._shape(reading, self._certificate(chosen, reading))
        try:
            config = spellings.completed(config_of(chosen, sources[0].config, shape).value)
        except MoetoolError:
            return ()
        forms = chosen.target.fused() if spelled.fused else chosen.target.per_expert()
        names = [chosen.prefix + filled(t, layer=shape.layers[0], expert=0) for t in forms.values()]
        folder, idle = sources[0].folder, self.options.silent
        return clients.judged(clients.traits(config, names, folder=folder, idle=idle))

    def _facts(
        self, plan: Plan, chosen: Conversion, reading: Reading, decisions: Decisions
    ) -> ModelFacts:
        said, width = self.options, reading.ffn.width // self.options.split
        idle = len(reading.layers) * 3 * reading.ffn.hidden * width * (said.experts - said.top_k)
        return ModelFacts(
            source_type=(chosen.outer or chosen.pair).source,
            target_type=chosen.target.model_type,
            layers=reading.layers,
            experts=said.experts,
            top_k=said.top_k,
            expert_width=width,
            layout="fused" if reading.fused else "per-expert",
            parameters=plan.parameters,
            active_parameters=plan.parameters - idle,
            expert_sources=reading.origin,
            trunks=tuple(decisions.report.get("trunks", ())),
        )

    def stands_for_ffns(self, made: Made) -> bool:
        """Where there are experts, each came from an FFN of a source."""
        return bool(ModelFacts.of(made.facts).expert_sources)

    def lines(self, summary: Summary) -> list[Line]:
        """The family, the experts, and how many parameters run."""
        return ModelFacts.of(summary.facts).lines()

    def notes(self, summary: Summary) -> list[Line]:
        """The factor on outputs, how far apart the trunks lie, and what was left out."""
        found, certificate = [], summary.certificate
        if certificate.place != "none":
            found.append(Line("scale", f"{certificate.scale:g} on {certificate.place}"))
        for row in ModelFacts.of(summary.facts).trunks:
            furthest = f"(furthest: {row['furthest']} {row['furthest_distance']:.3%})"
            apart = f"{row['source']} is {row['distance']:.3%} from the base {furthest}"
            found.append(Line("trunk", apart))
        plain = ("architectures", "model_type")  # of course they are another family's
        dropped = {
            name: why
            for name, why in left_out(summary).items()
            if not (name.startswith("config.") and name.rpartition(".")[2] in plain)
        }
        return found + [
            Line("left out", f"{name}: {why}") for name, why in list(dropped.items())[:SHOWN]
        ]


def _matrix(source: Checkpoint, ffn: Ffn, which: str) -> Any:
    """Gate or up of an FFN as float64 [width, hidden]."""
    return source.numbers(getattr(ffn, which))
