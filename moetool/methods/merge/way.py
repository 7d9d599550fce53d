"""What a way of merging is: a choice for each of the parts, under its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from moetool.data import JsonMapping, JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Certificate, Line
from moetool.methods.merge.combine import COMBINE
from moetool.methods.options import fields as fields_of
from moetool.methods.reduce import beside
from moetool.methods.reduce.way import Needs, Way, refuse_quantized, ways
from moetool.methods.reduce.writing import Writing
from moetool.surgery import layout
from moetool.surgery.reform import FORMS

if TYPE_CHECKING:
    from moetool.forward.block import Block
    from moetool.methods.merge.maker import Merger
    from moetool.methods.merge.options import Merging
    from moetool.methods.reduce.decision import Decision
    from moetool.methods.reduce.view import View
    from moetool.surgery.experts import Mixture

DENSE = ("outputs", "cosine", "mean-outputs", "outputs-and-logits")  # all experts on a sample
SAMPLED = (*DENSE, "router-logits")
WEIGHED = ("weights", "svd")


@dataclass(frozen=True)
class MergeParts:
    """The parts of a merge; what each can be stands in merge/options.py."""

    features: str
    cluster: str
    weigh: str
    combine: str
    align: str = "none"
    router: str = "centroid"
    joint: int = 1
    whiten: bool = False

    def needs(self) -> Needs:
        """What deciding looks at with these parts."""
        sampled = self.features in SAMPLED or self.align == "activations"
        led = self.cluster in ("dominant", "ream")  # by how much an expert is needed
        solved = self.combine in COMBINE and COMBINE[self.combine].refits
        return Needs(
            text=sampled or self.weigh != "uniform" or led or solved or self.whiten,
            sample=sampled or self.joint == 2,
            dense=self.features in DENSE,
            covariance=self.whiten,
            weights=self.features in WEIGHED or self.align != "none",
        )

    def changed(self, options: Merging) -> MergeParts:
        """With what was not left on auto."""
        told = {f.name: getattr(options, f.name) for f in fields(self)}
        kept = {name: value for name, value in told.items() if value != "auto"}
        if "joint" in kept:
            kept["joint"] = int(kept["joint"])
        if "whiten" in kept:
            kept["whiten"] = kept["whiten"] == "yes"
        return replace(self, **kept)

    def as_json(self) -> dict[str, str]:
        """For the report; the router has a line of its own."""
        names = ("features", "cluster", "joint", "weigh", "align", "combine", "whiten")
        return {n: str(getattr(self, n)).lower() for n in names}


class MergeWay(Way):
    """Subclass it in a file of this folder: `name` and `parts`. `combines`: a way of combining that
    only this class runs, whichever way --combine asks for it.
    """

    parts: ClassVar[MergeParts]
    combines: ClassVar[str] = ""
    writes = frozenset({"groups", "orders"})
    forms: ClassVar[tuple[str, ...]] = ()  # of --form, beside those that every way can write

    def __init_subclass__(cls) -> None:
        if "parts" in vars(cls):
            cls.needs = cls.parts.needs()

    def __init__(self, verb: Any, own: Any = None, named: type[Way] | None = None) -> None:
        super().__init__(verb, own, named)
        self.chosen: MergeParts = self.named.parts.changed(verb)  # type: ignore[attr-defined]
        self.needs, self.router = self.chosen.needs(), self.chosen.router
        if self._solves:
            self.verb = replace(verb, refit=verb.refit is not False)

    @property
    def _solves(self) -> bool:
        """Whether the way of combining ends in solved down matrices."""
        return self.chosen.combine in COMBINE and COMBINE[self.chosen.combine].refits

    @classmethod
    def known(cls) -> Mapping[str, type[MergeWay]]:
        import moetool.methods.merge as package

        return ways(package, MergeWay)

    @classmethod
    def acting(cls, verb: Any) -> type[Way]:
        combine = cls.parts.changed(verb).combine
        plain = MergeWay if cls.combines else cls  # another way of combining than its own
        return next((way for way in cls.known().values() if way.combines == combine), plain)

    def told(self) -> None:
        if self.options.form not in (*FORMS, *self.forms):
            able = [n for n, way in self.known().items() if self.options.form in way.forms]
            raise UsageError(
                f"--form {self.options.form} does not go with --method {self.called}",
                expected=", ".join((*FORMS, *self.forms)),
                hint=f"leave out --form, or use --method {' or '.join(able)}",
            )
        if self._solves and self.options.refit is False:
            raise UsageError(
                f"--combine {self.chosen.combine} is a mean whose down_proj is solved again: "
                "--no-refit leaves nothing of it",
                expected="--combine mean",
                hint="leave out --no-refit, or choose --combine mean",
            )
        self._check_parameters()

    def _check_parameters(self) -> None:
        """Refuse parameters of a way of combining that this is not."""
        chosen = COMBINE.get(self.chosen.combine)
        used = set(chosen.parameters.values() if chosen else ())
        used |= {"rank_energy"} if self.chosen.features == "svd" else set()
        for field in fields_of(type(self.verb)):
            owners = [c for c, how in COMBINE.items() if field.name in how.parameters.values()]
            told = getattr(self.verb, field.name) != field.default
            if owners and told and field.name not in used:
                raise UsageError(
                    f"--{field.spelled} does nothing without --combine {' or '.join(owners)}",
                    expected=f"--combine {owners[0]}",
                    found=f"--combine {self.chosen.combine}",
                    hint=f"leave out --{field.spelled}, or choose another way of combining",
                )

    def check(self, mixture: Mixture) -> None:
        refuse_quantized(mixture, "merging")
        bias = mixture.layout.overlay.law.bias
        if self.router == "logsumexp" and bias != "logit":
            raise UsageError(
                f"--router logsumexp needs a bias in the logits, and {mixture.layout.model_type} has none",
                expected=layout.those(lambda known: known.overlay.law.bias == "logit"),
                hint="--router centroid or mean",
            )

    def notes(self, mixture: Mixture) -> list[str]:
        return [*self._features_unused(mixture), *self._one_by_one(mixture)]

    def _features_unused(self, mixture: Mixture) -> list[str]:
        """REAM's first leader takes BIG - 1 others: where no more are to go, all of them, whatever
        lies near what.
        """
        from moetool.methods.merge.parts.group import BIG
        from moetool.methods.reduce import budget

        asked = getattr(self.verb, "features", "auto")
        if asked == "auto" or self.chosen.cluster != "ream" or self.options.budget != "uniform":
            return []
        gone = (mixture.experts - budget.uniform(mixture, self.options.ratio)) // mixture.groups
        if gone >= BIG:
            return []
        return [
            f"--features {asked} changes nothing: with --cluster ream the first leader takes up to "
            f"{BIG - 1} experts, here all {gone} that go; --cluster ward forms clusters by them"
        ]

    def _one_by_one(self, mixture: Mixture) -> list[str]:
        """Layers that were to be decided in pairs, and are not."""
        if self.chosen.joint == 1:
            return []
        if self.options.walks:
            return [
                "layers were clustered one by one: inside a walk (--propagate) the layer above is not there yet"
            ]
        if mixture.groups > 1:
            return [
                "layers were clustered one by one: a group-limited router fixes each group's number of experts"
            ]
        return []

    def buffers(self, mixture: Mixture) -> int:
        from moetool.kernels import shared_basis

        if self.chosen.features != "svd":
            return self.needs.buffers
        hidden = int(mixture.layout.field("hidden", mixture.text_model.config))
        width = max(map(mixture.width, mixture.layers))
        return shared_basis.memory(mixture.experts, hidden, width)

    def choose(self, view: View, count: int) -> Decision:
        from moetool.forward import finite
        from moetool.methods.merge.parts import align, features, group

        if self.needs.weights:
            folder = view.mixture.source.folder
            finite.check_experts(folder, view.layer, view.block.experts)
        points = features.points(self.chosen.features, view, self.verb.rank_energy)
        kind, weigh = self.chosen.cluster, self.chosen.weigh
        decision = group.decide(view, count, kind=kind, points=points, weigh=weigh)
        return replace(decision, orders=align.orders(self.chosen.align, view, decision))

    def finish(
        self, layers: dict[int, Decision], view: Callable[[int], View]
    ) -> dict[int, Decision]:
        """Pairs of consecutive MoE layers decided together; a lone last layer stays as it was
        decided.
        """
        from moetool.methods.merge.parts import align, group

        numbers = sorted(layers)
        if self.chosen.joint == 1 or view(numbers[0]).mixture.groups > 1:
            return layers
        for first, second in zip(numbers[0::2], numbers[1::2], strict=False):
            counts = (layers[first].count, layers[second].count)
            layers[first], layers[second] = group.joint(
                (view(first), view(second)), counts, self.chosen.weigh
            )
        return {
            n: replace(decision, orders=align.orders(self.chosen.align, view(n), decision))
            for n, decision in layers.items()
        }

    def how(self) -> JsonObject:
        """Parameters of kernels/merge.py."""
        combine = COMBINE[self.chosen.combine]
        whitened = {"whiten": True} if self.chosen.whiten and combine.whitens else {}
        return combine.told(self.verb) | whitened

    def block(self, view: View, decision: Decision, block: Block) -> Block:
        from moetool.forward.block import as_held
        from moetool.methods.merge.parts.rebuild import Rule, merged_block

        down = view.mixture.pieces(view.layer, decision.leads[0])["down"]
        dtype = view.mixture.source.tensor(down.name).dtype
        held = partial(as_held, view.mixture, view.layer, kept=self.options.form)
        return merged_block(block, decision, Rule(self.how(), self.router, dtype, held), view.stats)

    def maker(self, writing: Writing) -> Merger:
        from moetool.methods.merge.maker import Merger

        return Merger(self.how(), writing)

    def certificate(self, writing: Writing) -> Certificate:
        experts = writing.mixture.experts
        if all(decision.count == experts for decision in writing.decided.layers.values()):
            return Certificate("exact", "nothing was merged: a copy")
        how = ", then down_proj solved again" if beside.solved(writing.extra) else ""
        return Certificate(
            "none",
            f"experts were merged{how}: another function, by how much `moetool eval --reference` measures",
            None,
        )

    def facts(self, mixture: Mixture) -> JsonObject:
        return {"router": self.router, "parts": self.chosen.as_json()}

    @classmethod
    def lines(cls, facts: JsonMapping) -> list[Line]:
        shown = ", ".join(f"{part} {value}" for part, value in facts["parts"].items())
        return [Line("parts", f"{shown}, router {facts['router']}")]
