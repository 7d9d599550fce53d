"""A model with a group of experts, as a class with experts would have it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, frexp, log2, sqrt

from moetool.errors import MoetoolError
from moetool.methods.upcycle import bare
from moetool.methods.upcycle.config import Shape
from moetool.methods.upcycle.diversify import Diversify
from moetool.methods.upcycle.experts import Ffn, GivenExperts, GivenRouter, Layer
from moetool.methods.upcycle.route import Router
from moetool.methods.upcycle.targets import Conversion
from moetool.methods.upcycle.weighing import ALWAYS, DOMAIN, Weighing
from moetool.surgery import forms, groups
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import EMPTY, FIRST_SITE, LINEAR, PART, Group
from moetool.surgery.inside import HELD
from moetool.surgery.route import MODALITY, ROUTED
from moetool.surgery.spec import rows, whole
from moetool.surgery.text_model import TextModel, text_model, tower_of

SCALE, ACTIVATION = "output_scale", "activation"  # of a form's params
# Why no class has experts there; of other sites it is said that none has.
_ELSEWHERE = {LINEAR: "a router for each linear: classes with experts route once for a whole FFN"}
_KEYS = (ROUTED, ALWAYS, DOMAIN)  # what a class's router may stand for
HALVES = ("BF16", "F16")
REACH = 4.0  # of scores: their sigmoids differ as float32 tells the scores apart
SATURATED = 16.0  # of scores: the sigmoids of larger ones are one


@dataclass(frozen=True)
class HeldGroup:
    """A checkpoint with one group of experts; `dense`: what it stands on."""

    source: Checkpoint
    dense: Checkpoint
    at: TextModel
    group: Group
    block: FfnBlock
    left: tuple[Group, ...] = ()  # groups that add nothing

    @classmethod
    def of(cls, source: Checkpoint) -> HeldGroup:
        """MoetoolError for a model without groups, and for groups that no class has."""
        at = text_model(own(source).config)
        if not at.groups:
            raise MoetoolError(
                "no stock class has layers of different numbers of experts, or corrected routers",
                file=source.folder,
                expected="groups of experts",
                found="a mixture of experts of its own class but for that",
                hint="make it again of the model it was made from: prune and merge with --uneven "
                "zeroed, extend with --layers all and without --calibration",
            )
        left = tuple(filter(bare.adds_nothing, at.groups))
        group = _only(source, [one for one in at.groups if one not in left])
        block = FfnBlock.of(tower_of(groups.base_of(source.config), group.tower).layout)
        return cls(source, bare.base_of(source), at, group, block, left)

    @property
    def ffn(self) -> Ffn:
        """The first expert, whose shapes are all experts'."""
        return self.expert(self.group.layers[0], 0)

    @property
    def weighing(self) -> Weighing:
        """How it weighs its experts."""
        found = Weighing.of(self.group)
        assert found is not None  # others are refused
        return found

    @property
    def top_k(self) -> int:
        return self.weighing.top_k

    def _module(self, layer: int) -> str:
        return self.at.name(self.block.module, layer=layer)

    def scales(self) -> Iterator[str]:
        """Names of the experts' output scales."""
        if self.group.params.get(SCALE):
            for layer in self.group.layers:
                for expert in range(self.group.experts):
                    yield self._scale(layer, expert)

    def _scale(self, layer: int, expert: int) -> str:
        return f"{self._module(layer)}.{self.group.expert(expert, part=SCALE)}"

    def expert(self, layer: int, expert: int | None) -> Ffn:
        """An expert's matrices (None: the layer's own), where it has none of its own the FFN's."""
        found = {}
        for linear in self.block.linears:
            own = self.at.name(linear.slot.name, layer=layer)
            if expert is not None and self.group.has(linear.name):
                own = f"{self._module(layer)}.{self.group.expert(expert, linear.lies, 'weight')}"
            found[linear.role] = self.source.tensor(own)
        down, both = found.get("down"), found.get("gate_up")
        if down is None or not (both or {"gate", "up"} <= set(found)):
            raise MoetoolError(
                f"{groups.family_of(self.source.config)} has no gated FFN, and no class with "
                "experts has another",
                file=self.source.folder,
                expected="gate, up and down",
                found=", ".join(found),
                hint="it runs with `import moetool`, as it is",
            )
        hidden, width = down.shape
        if both is not None:
            gate, up = rows(both, 0, width), rows(both, width, 2 * width)
        else:
            gate, up = whole(found["gate"]), whole(found["up"])
        return Ffn(gate, up, whole(down), width, hidden, self._dtype(expert, down.dtype))

    def _dtype(self, expert: int | None, dtype: str) -> str:
        """Of an expert's matrices in full: in a model of 16 bits those 16 that hold what the form
        stores, where there are such.
        """
        fits = forms.named(self.group.form).fits_in if expert is not None else ""
        return fits if fits and not self.group.params.get(SCALE) and dtype in HALVES else dtype

    @property
    def rounds(self) -> bool:
        """Whether an expert's matrices are not what the file holds, but rounded to 16 bits."""
        form, dtype, weighing = forms.named(self.group.form), self.ffn.dtype, self.weighing
        scaled = bool(self.group.params.get(SCALE)) or self.group.route.key == DOMAIN
        factors = (weighing.factor, weighing.router)
        scaled |= any(frexp(factor)[0] != 0.5 for factor in factors)  # no power of two
        return dtype in HALVES and (scaled or (form.in_groups and form.fits_in != dtype))

    def given(self, layer: int, scales: dict[str, float], cooled: float = 1.0) -> GivenExperts:
        """What is there of a layer. `cooled`: what its router is multiplied by, beside the rest."""
        every, weighing = range(self.group.experts), self.weighing
        return GivenExperts(
            self.expert(layer, None) if self.group.base != "gone" else self.ffn,
            [self.expert(layer, e) for e in every],
            [scales.get(self._scale(layer, e), 1.0) * weighing.factor for e in every],
            self._router(layer)._replace(scale=cooled * weighing.router),
        )

    def _router(self, layer: int) -> GivenRouter:
        if self.group.route.key == ALWAYS:
            return GivenRouter("zeros")
        head = f"{self._module(layer)}.{self.group.router}"
        tensors = [whole(self.source.tensor(f"{head}.{t.name}")) for t in self.group.router_tensors]
        return GivenRouter("domain_rows" if self.group.route.key == DOMAIN else "copy", tensors)

    def cooled(self) -> dict[str, float]:
        """Layer -> the power of two by which its router may be multiplied so that sigmoids of its
        scores differ: float32 rounds those of 17 and more to 1. Inputs are normed, to about one.
        """
        found = {}
        for layer in self.group.layers:
            reach = self._reach(layer)
            if reach > REACH:
                found[str(layer)] = 2.0 ** -ceil(log2(reach / REACH))
        return found

    def saturates(self) -> bool:
        """Whether scores may be so large that their sigmoids are all one, in some layer."""
        return any(self._reach(layer) > SATURATED for layer in self.group.layers)

    def _reach(self, layer: int) -> float:
        """How large scores become, at most, of inputs that are normed to about one."""
        router = self._router(layer)
        if not router.parts:
            return 0.0
        import numpy as np

        found = [self.source.numbers(piece) for piece in router.parts]
        rows = found[0]
        if router.op == "domain_rows":
            domains, gate, up, down = found
            gated = domains @ gate.T
            rows = (gated / (1 + np.exp(-gated)) * (domains @ up.T)) @ down.T
        return float(sqrt((rows**2).sum(1).max() * rows.shape[1]))

    def layer(self, chosen: Conversion, number: int) -> Layer:
        """The layer as the new family has it."""
        single = chosen.target.per_expert() and chosen.target.experts.reads_per_expert
        return Layer(
            number=number,
            experts=self.group.experts,
            split=1,
            origin=tuple(range(self.group.experts)),
            order=None,
            diversify=Diversify(),
            router=Router("zero"),
            scale=1.0,
            shared=self.group.base == "beside",
            fused=not single,
            seed=0,
        )

    def shape(self, chosen: Conversion) -> Shape:
        """What the config says of the experts."""
        width = self.ffn.width
        shared = self.group.base == "beside"
        return Shape(self.group.layers, self.group.experts, self.top_k, width, width, shared, 1.0)


def own(source: Checkpoint) -> Checkpoint:
    """The same; MoetoolError for a model without groups."""
    if groups.is_ours(source.config):
        return source
    raise MoetoolError(
        "this model has no groups of experts",
        file=source.folder,
        expected=f"model type {groups.MODEL_TYPE}",
        found=source.config.get("model_type"),
        hint="every client that knows its class loads it as it is",
    )


def _only(source: Checkpoint, held: Sequence[Group]) -> Group:
    """The one group that does something. MoetoolError where no class has such, whatever the
    family.
    """
    if not held:
        raise _refused(
            source,
            "the groups of this model add nothing",
            "--target base writes what computes the same without them",
        )
    if len(held) > 1:
        every = ", ".join(map(bare.named, held))
        raise _refused(source, f"no class has more than one group of experts: {every}")
    (group,) = held
    if wrong := _wrong(group):
        why = f"no class has {wrong} (group {bare.named(group)})"
        raise _refused(source, why, _instead(group))
    return group


def _instead(group: Group) -> str:
    """What can be written all the same, of a group that no class has."""
    if group.form == bare.LORA and group.tower == "text":
        return (
            "--target peft writes an adapter where PEFT computes the same, or with "
            "--request-gates one request's; as it is, it runs with `import moetool`"
        )
    if group.route.key == MODALITY:
        return "--target base writes what text uses; with the rest it runs with `import moetool`"
    return ""


def _wrong(group: Group) -> str:
    """What no class has of a group; empty where one may."""
    route = group.route
    if group.site != FIRST_SITE:
        return _ELSEWHERE.get(group.site, f"experts at the site {group.site}")
    if group.tower != "text":
        return f"experts in the {group.tower} tower"
    if group.form == PART and route.key == "neurons":
        return "a router with an activation, |act(g x) u x|, as the parts of an FFN have here"
    if route.key not in _KEYS:
        return f"a route that looks at {route.key}"
    if Weighing.of(group) is None:
        said = ", ".join(f"{name} {value}" for name, value in route.options.items())
        return f"the law {route.law}" + (f" ({said})" if said else "")
    if route.bias:
        return "a router with a bias"
    if "mix" in group.params:
        return "experts that are mixed inside each linear"
    if group.form in HELD:
        return f"{group.form} experts, which change what goes into an FFN or comes out of it"
    if group.form == PART:
        return "experts that are parts of the FFN's own matrices"
    if group.base == "member" or group.form == EMPTY:
        return f"{group.form} experts whose FFN is {group.base}"
    if ACTIVATION in group.params and group.base == "beside":
        return f"experts that compute with {group.params[ACTIVATION]} beside an FFN that does not"
    return ""


def _refused(source: Checkpoint, why: str, hint: str = "") -> MoetoolError:
    return MoetoolError(
        why,
        file=source.folder,
        expected="one group of experts, by token",
        hint=hint or "it runs with `import moetool`, as it is",
    )
