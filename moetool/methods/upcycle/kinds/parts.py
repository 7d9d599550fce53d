"""Parts of the FFN, cut without text: each neuron is in one expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate, Decisions, Settings
from moetool.methods.upcycle import carve, reordering, scale
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.keys.neurons import NeuronsKey
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.methods.upcycle.laws.law import INSIDE
from moetool.methods.upcycle.options import Upcycling
from moetool.surgery import groups
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import FIRST_SITE, MODEL_TYPE, PART, Group
from moetool.surgery.reform import FORMS, Into
from moetool.surgery.route import ROUTED
from moetool.surgery.spec import rows


class PartsKind(ExpertKind):
    """Parts of the FFN with --split and --target moetool, or another --key than token: as many
    experts, the FFN's own bytes, whose outputs are added: each as it is (--law hard), or by shares
    times --scale (auto: the number of parts); a bias of what comes out counts once. UoE (arXiv
    2503.02495).
    """

    name = "parts"
    law = "hard"
    takes: ClassVar[tuple[str, ...]] = ("carve", "split", "scale")

    @classmethod
    def meant(cls, said: Upcycling) -> bool:
        if said.form == cls.name:
            return True
        cut = said.form in FORMS and said.split > 1 and said.carve not in carve.BY_TEXT
        ours = said.target == MODEL_TYPE or said.key != ROUTED
        return cut and ours and said.site == FIRST_SITE

    @classmethod
    def standing(cls, said: Upcycling) -> str:
        return INSIDE

    @property
    def stands(self) -> str:
        return INSIDE

    @property
    def factor(self) -> float:
        """On what experts give: shares of a token that sum to one are of so many parts."""
        return scale.said(self.verb.scale, self.verb.split if self.combine.sums else 1.0)

    def width(self, ground: Ground, group: Group) -> int:
        return ground.width // self.verb.split

    def told(self) -> None:
        said = self.verb
        if said.experts != said.split or said.split < 2:
            raise self._wrong(
                "as many experts as parts", f"--experts {said.experts} --split {said.split}"
            )
        if said.carve in carve.BY_TEXT:
            raise self._wrong("a carve without text", f"--form {self.name} --carve {said.carve}")
        if isinstance(self.key, NeuronsKey):
            raise self._wrong("--carve activation, or another --key", f"--key {self.key.name}")
        super().told()
        assert self.factor is not None  # refused here

    def _wrong(self, expected: str, found: str) -> UsageError:
        return UsageError(
            "parts of the FFN as experts do not go with that",
            expected=expected,
            found=found,
            hint="for example --experts 8 --split 8 --top-k 4 --key sequence",
        )

    @property
    def how(self) -> str:
        """How neurons are chosen."""
        return carve.parse(self.verb.carve, self.verb.split)[0]

    def check(self, ground: Ground) -> None:
        carve.check_width(ground.width, self.verb.split)
        reordering.check(ground)
        roles = {linear.role: linear for linear in ground.block.linears}
        joint = "gate_up" in roles and roles["gate_up"].transposed
        run = any(linear.rows is not None for linear in roles.values())
        if self.how != "contiguous" and (joint or run or groups.is_ours(ground.source.config)):
            raise UsageError(
                "neurons cannot be put in another order here",
                expected="a model without groups, its matrices by themselves as [out, in]",
                found=f"{', '.join(sorted(roles))} of {ground.source.config.get('model_type')}",
                hint="leave out --carve: parts are contiguous then",
            )

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """The order of neurons of each layer; nothing where parts are contiguous."""
        if self.how == "contiguous":
            return Decisions()
        ground = self.ground(sources[0])
        self.check(ground)
        width, split, needed = ground.width, self.verb.split, 0
        if self.how != "random":
            needed = carve.check_memory(width, ground.hidden, settings.memory)
        tables = {}
        for layer in ground.layers:
            name, read = carve.order_name(layer), partial(self._matrix, ground, layer)
            tables[name] = carve.order(self.how, width, split, settings.seed, name, read) or []
        return Decisions(tables, memory=needed)

    def _matrix(self, ground: Ground, layer: int) -> Any:
        """What --carve clusters, of a layer, as float64 [neurons, hidden]."""
        asked = carve.parse(self.verb.carve, self.verb.split)[1]
        held = {linear.role: linear for linear in ground.block.linears}
        linear = held.get(asked) or held.get("gate_up") or held.get("fc1") or held["up"]
        stored = ground.stored(linear, layer)
        first = ground.width if (linear.role, asked) == ("gate_up", "up") else 0
        last = stored.shape[0] if linear.transposed else first + ground.width
        made = ground.source.numbers(rows(stored, first, last))
        return made.T if linear.transposed else made

    def group(self, ground: Ground) -> Group:
        return replace(super().group(ground), form=PART, base="under", scale=self.factor)

    def copied(self, build: Builder, ground: Ground, name: str) -> bool:
        return self.how != "contiguous" and reordering.copied(build, ground, name)

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        return {}

    def certificate(self, group: Group, sources: int) -> Certificate:
        parts, route = group.experts, group.route
        total = 1.0 if self.combine.sums else None  # of the weights of a token
        total = float(route.top_k) if route.law == "hard" else total
        coverage = None if total is None else group.scale * total / parts
        alike = route.law == "hard" or (self.first_router.law == "zero" and self.key.draws)
        if coverage != 1.0 or group.reached < parts or not alike:
            why = "a token does without some neurons of its FFNs, or weighs them"
            return Certificate("none", why, coverage)
        return Certificate("exact", "all parts of the FFN run, each with the weight 1")
