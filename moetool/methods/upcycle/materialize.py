"""moetool materialize: experts that only moetool runs, written in full as a class that every client
loads, where that computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isfinite, nan
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import (
    Builder,
    Certificate,
    Decisions,
    Line,
    Made,
    Method,
    ModelFacts,
    Settings,
    Summary,
)
from moetool.methods.field import WHAT
from moetool.methods.options import Served, option
from moetool.methods.upcycle import bare, fused, to_hub, to_peft, to_xlora
from moetool.methods.upcycle.config import config_of
from moetool.methods.upcycle.experts import write_given
from moetool.methods.upcycle.held import ACTIVATION, SATURATED, HeldGroup, own
from moetool.methods.upcycle.targets import Conversion, Spelling, Tried, Wish, named, refusals
from moetool.methods.upcycle.trunk import Trunk
from moetool.surgery import clients, groups, reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.clients import Judged
from moetool.surgery.family import filled
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import whole
from moetool.surgery.spellings import completed

SOFTMAX = ("softmax",)


@dataclass(frozen=True)
class Materializing(Served):
    """The options of materialize."""

    target: str = option(
        "auto",
        "model type to write, or auto (of those that are exact the one that works in most "
        "clients); base: without the groups, where these add nothing or are not text's; peft: an "
        "adapter folder; internlm2_ve: copies of FFNs for image tokens, as Mono-InternVL has them",
        WHAT,
        metavar="FAMILY|base|peft|internlm2_ve",
    )
    base: str = option(
        "",
        "with --target peft: what the adapter calls its base; as the record of the model calls it",
        metavar="NAME",
    )
    request_gates: str = option(
        "",
        "with --target peft: the weights of the experts for one request, where each linear adds "
        "its experts up; written as one adapter. With / between them, those of each layer of the "
        "group",
        metavar="0.2,0.8[/1,0...]",
    )

    noise: str = option(
        "",
        "of experts that the noise level chooses: the level (what the caller would give as `noise`) "
        "for which they are written, as one wide FFN of the dense family",
        WHAT,
        metavar="LEVEL",
    )

    def __post_init__(self) -> None:
        self.level()
        if self.noise and self.target != "auto":
            raise UsageError(
                "--noise writes the dense family that the model stands on",
                expected="--noise LEVEL without --target",
                found=f"--noise {self.noise} --target {self.target}",
                hint="leave out --target",
            )
        if self.target != to_peft.TARGET and (self.base or self.request_gates):
            raise UsageError(
                "--base and --request-gates are of an adapter",
                expected="--target peft",
                found=f"--target {self.target}",
                hint="add --target peft, or leave them out",
            )
        if self.target == to_peft.TARGET and self.named:
            raise UsageError(
                "--for judges models, and an adapter is none by itself",
                expected="--target peft without --for",
                found=f"--for {','.join(self.named)}",
                hint="leave out --for: every client of PEFT reads it, on top of its base",
            )
        self.gates()

    def level(self) -> float:
        """The noise level. UsageError for what is no number."""
        try:
            found = float(self.noise or 0)
        except ValueError:
            found = nan
        if not isfinite(found):
            raise UsageError(
                "--noise is no number",
                expected="a noise level, for example 0.25",
                found=self.noise,
                hint="what the caller would give as `noise`",
            )
        return found

    def gates(self) -> list[list[float]]:
        """The numbers of --request-gates, of all layers or of each. UsageError for what is none."""
        rows = self.request_gates.split("/") if self.request_gates else []
        try:
            found = [[float(word) for word in row.split(",")] for row in rows]
        except ValueError:
            found = [[nan]]
        if not all(map(isfinite, chain.from_iterable(found))):
            raise UsageError(
                "--request-gates are no numbers",
                expected="the weight of each expert: 0.2,0.8,0,0",
                found=self.request_gates,
                hint="commas stand between them, and / between layers",
            )
        return found


class Materialize(Method):
    """Write the experts of a model of moetool's own in full, as a mixture of experts of a class
    that every client loads. Refuses with the reason where no class computes the same.

    Low-rank experts become W + (alpha / rank) B A; ternary experts their decoded matrices, beside
    the FFN as the shared expert.
    """

    Options = Materializing
    reads_groups: ClassVar[bool] = True
    lays = True
    examples = (
        "moetool materialize OWN NATIVE",
        "moetool materialize OWN NATIVE --target qwen2_moe",
        "moetool materialize OWN NATIVE --for vllm --dry-run",
        "moetool materialize OWN ADAPTER --target peft --base org/name",
        "moetool materialize CLONES NATIVE --target internlm2_ve",
        "moetool materialize DENOISERS DENSE --noise 0.25",
    )
    options: Materializing

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """The experts' output scales, which become part of their down_proj, and of routers whose
        scores go through a sigmoid that only ranks them, by how much they are made smaller.
        """
        if self.options.noise:
            return Decisions(chosen=fused.decide(sources[0], self.options.level()))
        if self._twice(sources[0]):
            return to_xlora.decide(sources[0])
        if self.options.target in (to_peft.TARGET, bare.TARGET, *to_hub.names()):
            return Decisions()
        held = HeldGroup.of(sources[0])
        scales = {
            name: float(sources[0].numbers(whole(sources[0].tensor(name)))[0])
            for name in held.scales()
        }
        told: JsonObject = {"scales": scales}
        if self._chosen(held).target.overlay.law.score not in SOFTMAX:
            ranks = held.weighing.by_rank
            told |= {"routers": held.cooled()} if ranks else {"saturates": held.saturates()}
        return Decisions(chosen={name: what for name, what in told.items() if what})

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """Every expert in full; all else moves byte for byte, by the names of the new family."""
        if self.options.noise:
            chosen_at = decisions.chosen["noise"]
            return fused.plan(sources[0], chosen_at, self.options.level(), settings)
        if self.options.target == bare.TARGET:
            return bare.plan(own(sources[0]), settings)
        if self.options.target == to_peft.TARGET:
            if self._twice(sources[0]):
                order = decisions.chosen.get(to_xlora.ORDER, ())
                return to_xlora.plan(sources[0], self.options.base, order)
            return to_peft.plan(own(sources[0]), self.options.base, self.options.gates())
        if (family := to_hub.target(self.options.target)) is not None:
            return to_hub.plan(own(sources[0]), family, settings)
        held = HeldGroup.of(sources[0])
        chosen = self._chosen(held)
        scales: dict[str, float] = decisions.chosen.get("scales", {})
        routers: dict[str, float] = decisions.chosen.get("routers", {})
        build, trunk = Builder(), Trunk.of([held.dense], chosen, None)
        trunk.write(build, "before")
        for number in range(chosen.source.field("layers", chosen.config)):
            trunk.write(build, number)
            if number in held.group.layers:
                given = held.given(number, scales, routers.get(str(number), 1.0))
                write_given(build, chosen, held.layer(chosen, number), given)
            else:
                trunk.write_ffn(build, number)
        trunk.write(build, "after")
        config = config_of(chosen, held.dense.config, held.shape(chosen))
        told = _with_law(config.value, chosen, held)
        left = bare.dropped(held.source, held.left)
        dropped = {
            **trunk.dropped,
            **left,
            **dict.fromkeys(scales, "it is part of the expert's down_proj"),
        }
        wanted = Outputs(told, build.targets, build.tasks, dropped)
        plan = reform.plan(sources, wanted, max_shard=settings.max_shard, form="full")
        facts = _facts(held, chosen, plan)
        certificate = _certificate(held, chosen, saturates=bool(decisions.chosen.get("saturates")))
        return Made(plan, certificate, plan.config, config.dropped, facts)

    def _twice(self, source: Checkpoint) -> bool:
        """Whether it becomes X-LoRA of PEFT, and not one request's adapter."""
        asked = self.options.target == to_peft.TARGET and not self.options.gates()
        return asked and to_xlora.is_meant(own(source))

    def _chosen(self, held: HeldGroup) -> Conversion:
        """The conversion that computes what the group does and works in most clients."""
        shared = held.group.base == "beside"
        layers = ",".join(map(str, held.group.layers))
        ffn, count = held.ffn, held.at.field("layers")
        said = self.options
        wish = Wish(
            said.target, "auto", layers, shared, 1, held.top_k, ffn.width, count, said.named
        )
        reasons: dict[str, str] = {}
        able: list[Tried] = []
        for conversion in named(held.dense, wish):
            why = [
                *refusals(conversion, wish),
                *held.weighing.refusals(conversion.target),
                *_other_activation(held),
            ]
            if not why:
                tried = Tried.of(Spelling(conversion, fused=False), _judged(held, conversion), wish)
                why = tried.useless
                able += [] if why else [tried]
            reasons[f"not {conversion.pair.target}"] = "; ".join(why)
        if able:
            return max(able, key=lambda one: one.worth).spelling.conversion
        raise MoetoolError(
            "no class computes what these experts do",
            file=held.source.folder,
            **reasons,
            hint="it runs with `import moetool`, as it is",
        )

    def lines(self, summary: Summary) -> list[Line]:
        """The family, the experts, and how many parameters run."""
        return ModelFacts.of(summary.facts).lines()


def _judged(held: HeldGroup, chosen: Conversion) -> tuple[Judged, ...]:
    """What clients make of a conversion."""
    config = config_of(chosen, held.dense.config, held.shape(chosen)).value
    config = completed(_with_law(config, chosen, held))
    names = [
        chosen.prefix + filled(t, layer=held.group.layers[0], expert=0)
        for t in chosen.target.per_expert().values()
    ]
    return clients.judged(clients.traits(config, names, folder=held.source.folder))


def _other_activation(held: HeldGroup) -> Iterator[str]:
    """Why experts cannot have an activation that is not the family's."""
    asked = held.group.params.get(ACTIVATION)
    if asked is not None and len(held.group.layers) != held.at.field("layers"):
        yield f"layers without experts would compute with {asked} too, where theirs do not"


def _with_law(config: JsonObject, chosen: Conversion, held: HeldGroup) -> JsonObject:
    """The config, with weights renormalised or not, and the activation, as the group's are."""
    name, said = chosen.target.fields.get("renorm"), JsonObject()
    if chosen.target.overlay.law.renorm == "field" and name is not None:
        said[name] = held.weighing.renormalised
    if asked := held.group.params.get(ACTIVATION):
        said["hidden_act"] = asked
    inside = "text_config" if chosen.outer is not None else chosen.target.text_config
    return config | ({inside: config[inside] | said} if inside else said)


def _certificate(held: HeldGroup, chosen: Conversion, *, saturates: bool) -> Certificate:
    """Exact but for what is rounded, here or there. `saturates`: whether scores may be so large
    that their sigmoids are equal.
    """
    why = f"every expert in full, weighed by {chosen.target.model_type} as by moetool"
    rounded = [f"matrices are rounded to {held.ffn.dtype}"] if held.rounds else []
    activations = held.group.params.get("activations")
    if activations:
        rounded.append(f"activations of experts, which moetool rounds to {activations}, are not")
    if saturates:
        rounded.append(f"scores are below {SATURATED:g}, above which sigmoids are rounded to one")
    return Certificate("exact_if" if rounded else "exact", "; ".join([why, *rounded]))


def _facts(held: HeldGroup, chosen: Conversion, plan: Plan) -> ModelFacts:
    group = held.group
    single = chosen.target.per_expert() and chosen.target.experts.reads_per_expert
    return ModelFacts(
        source_type=groups.MODEL_TYPE,
        target_type=chosen.target.model_type,
        layers=group.layers,
        experts=group.experts,
        top_k=held.top_k,
        expert_width=held.ffn.width,
        layout="per-expert" if single else "fused",
        parameters=plan.parameters,
        active_parameters=plan.active_parameters,
    )
