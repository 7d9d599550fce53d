"""What a kind of experts is: one class in one file of this folder; it shows up by itself.

A kind says where its experts stand (`base`), what they compute at birth (`starts`), has `Options`
of its own, and writes the tensors of one layer. Nothing heavy is imported here: `--help` reads all
kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate, Decisions, Settings
from moetool.methods.options import fields
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.methods.upcycle.keys.token import TokenKey
from moetool.methods.upcycle.laws.law import RouteLaw
from moetool.methods.upcycle.laws.renormalised import RenormalisedWord
from moetool.methods.upcycle.options import AUTO, Upcycling
from moetool.methods.upcycle.route import Router
from moetool.methods.upcycle.word import Word, words
from moetool.surgery import places
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import FIRST, FIRST_SITE, LINEAR, MODEL_TYPE, Group
from moetool.surgery.reform import Into
from moetool.surgery.route import Route
from moetool.surgery.spec import Piece

# Options of upcycle that mean the same to experts of any kind.
_ROUTED = ("experts", "top_k", "layers", "router", "key", "law")
_COMMON = (*_ROUTED, "target", "form", "for_", "site", "tower", "name", "linears")
# Where experts stand, of each `base`, for a sentence.
_STAND = {
    "under": "the FFN stays whole, and experts change it",
    "beside": "the FFN stays whole, and experts stand beside it",
    "member": "the FFN stays whole, as the first of the experts",
    "gone": "each expert is a whole copy of the FFN",
    "inside": "each expert is a part of the FFN",
}


class ExpertKind(Word):
    """Subclass it in a file of this folder; the first sentence of its docstring describes it.
    `starts`: what an expert computes at birth: `ffn` (what the layer's FFN does), `zero`, or `near`
    (something like it).
    """

    base: ClassVar[str] = "under"
    starts: str = "ffn"
    law: ClassVar[str] = "renormalised"  # what --law auto means
    looks: ClassVar[str] = ""  # what --key token means, where it is another
    top_k: ClassVar[int] = 2  # experts of a token, where nothing is said
    takes: ClassVar[tuple[str, ...]] = ()  # options of upcycle beyond those that all kinds take
    several: ClassVar[bool] = False  # whether --from means anything
    sites: ClassVar[tuple[str, ...]] = ("ffn",)  # where such experts can stand

    def __init__(
        self,
        verb: Upcycling,
        own: Any = None,
        key: RouteKey | None = None,
        law: RouteLaw | None = None,
    ) -> None:
        self.verb = verb
        self.own: Any = own if own is not None else self.Options()
        self.key, self.combine = key or TokenKey(), law or RenormalisedWord()
        self.found = Decisions()

    @classmethod
    def known(cls) -> Mapping[str, type[ExpertKind]]:
        """name -> kind, in name order."""
        return words(ExpertKind)

    @classmethod
    def needs_text(cls) -> bool:
        """No kind looks at text."""
        return False

    @classmethod
    def meant(cls, said: Upcycling) -> bool:
        """Whether these options mean this kind."""
        return said.form == cls.name

    @property
    def grows(self) -> bool:
        """Whether the result is of moetool's own model type."""
        return bool(self.name)

    @property
    def spelled(self) -> str:
        """How a user asks for it."""
        return f"--form {self.name}"

    def told(self) -> None:
        """Refuse options that do not go together."""
        if not self.grows:
            self._native()
            return
        allowed = (*_COMMON, *self.takes)
        for field in fields(type(self.verb)):
            if field.name in allowed or getattr(self.verb, field.name) == field.default:
                continue
            raise UsageError(
                f"--{field.spelled} does nothing with {self.spelled}",
                expected=f"{self.spelled} without --{field.spelled}",
                found=f"--{field.spelled} {getattr(self.verb, field.name)}",
                hint=f"leave out --{field.spelled}: {_STAND[self.stands]}",
            )
        self._at_site()
        if self.verb.target not in ("auto", MODEL_TYPE):
            raise UsageError(
                f"{self.verb.target} has no experts of this form",
                expected=f"--target {MODEL_TYPE}",
                found=f"{self.spelled} --target {self.verb.target}",
                hint="leave out --target; `moetool materialize` writes a native model of it, "
                "where that is exact",
            )
        self.key.told(self.verb.site, self.combine)
        if not self.key.draws and self.verb.router != AUTO:
            raise UsageError(
                f"--key {self.key.name} has no router that starts at random",
                expected=f"--key {self.key.name} alone",
                found=f"--router {self.verb.router}",
                hint="leave out --router",
            )
        self.combine.told(self.stands, self.verb.top_k)
        if self.verb.top_k > self.choices:
            raise UsageError(
                f"--law {self.combine.name} has {self.combine.rest} of the experts always on",
                expected=f"--experts {self.verb.top_k + self.combine.rest} or more",
                found=f"--experts {self.verb.experts} --top-k {self.verb.top_k}",
                hint="raise --experts",
            )

    @property
    def linears(self) -> tuple[str, ...]:
        """Which linears of a layer get experts, at the site of linears; all, where none is said."""
        return tuple(filter(None, self.verb.linears.split(",")))

    @classmethod
    def standing(cls, said: Upcycling) -> str:
        """What becomes of the layer's own FFN, before it is known what is looked at."""
        return cls.base

    @property
    def stands(self) -> str:
        """What becomes of the layer's own FFN (surgery/groups.py)."""
        return self.base

    @property
    def keeps_width(self) -> bool:
        """Whether its experts give what is as wide as what they see."""
        return False

    def width(self, ground: Ground, group: Group) -> int:
        """Neurons of an expert; 0 where experts are no FFNs."""
        return ground.width if any(group.has(one.name) for one in ground.block.linears) else 0

    @property
    def choices(self) -> int:
        """What the router chooses among."""
        return self.verb.experts + (self.stands == "member") - self.combine.rest

    def _at_site(self) -> None:
        if self.verb.linears and self.verb.site != LINEAR:
            raise UsageError(
                "--linears says which linears have experts of their own",
                expected=f"--site {LINEAR}",
                found=f"--linears {self.verb.linears} --site {self.verb.site}",
                hint="leave out --linears",
            )
        if self.verb.site in self.sites:
            return
        fitting = [f"--form {n}" for n, k in self.known().items() if self.verb.site in k.sites]
        raise UsageError(
            f"no experts of this form stand at the site {self.verb.site}",
            expected=f"--site {', '.join(self.sites)}",
            found=f"{self.spelled if self.name else 'no --form'} --site {self.verb.site}",
            hint=f"with --site {self.verb.site} go {', '.join(fitting)}",
        )

    def _native(self) -> None:
        self._at_site()
        asked = (("law", AUTO), ("tower", AUTO), ("name", ""))
        said = {n: getattr(self.verb, n) for n, usual in asked if getattr(self.verb, n) != usual}
        said |= {"router-bias": True} if self.key.bias else {}
        known = self.known().get(self.verb.form)
        more = known.further if known is not None else ""
        form = f"--form {self.verb.form} " if known is not None else ""
        for name, value in said.items():
            raise UsageError(
                f"--{name} is no matter where a stock class holds the experts",
                expected=more or f"--form {', '.join(self.known())}",
                found=f"{form}--{name} {value} alone",
                hint=f"leave out --{name}{f', or add {more}' if more else ''}",
            )

    @property
    def first_router(self) -> Router:
        """How the router starts."""
        return Router.parse(self.verb.router, 1, self.verb.top_k)

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Look at what must be read to plan: nothing, for most kinds."""
        return Decisions()

    def told_by(self, found: Decisions) -> tuple[str, ...]:
        """Plan with what was decided; what the user must be told of it."""
        self.found = found
        return ()

    def ground(self, source: Checkpoint) -> Ground:
        """Where in a source they are to stand. MoetoolError where that is nowhere."""
        said = self.verb
        return Ground.of(source, said.layers, said.site, said.tower, self.linears)

    def check(self, ground: Ground) -> None:
        """Refuse a model that cannot have such experts, from headers alone."""

    def params(self, ground: Ground) -> JsonObject:
        """What the config says of the experts' form."""
        return {}

    def group(self, ground: Ground) -> Group:
        """What the config says of all."""
        top_k, said = self.verb.top_k, self.verb
        options = self.key.options(ground, self.choices, top_k)
        options |= self.combine.options(ground.hidden)
        return Group(
            form=self.name,
            experts=said.experts,
            layers=ground.layers,
            base=self.stands,
            params=self.params(ground),
            site=said.site,
            name=said.name or FIRST,
            tower=ground.tower,
            route=Route(self.key.name, self.combine.name, top_k, self.key.bias, options),
        )

    def copied(self, build: Builder, ground: Ground, name: str) -> bool:
        """Plan a tensor of SRC that is not copied as it lies; whether it is one."""
        return False

    def routed(self, build: Builder, spot: Spot) -> bool:
        """Plan all of a router that is there already; whether it is."""
        return False

    def router(self, build: Builder, spot: Spot) -> Piece | None:
        """Where the router of a layer lies that is there already."""
        return None

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        """Plan the tensors of a layer's experts; the forms of those that are encoded."""
        raise NotImplementedError

    def certificate(self, group: Group, sources: int) -> Certificate:
        """How the result relates to its source at birth. `sources`: how many there are."""
        beside = group.base == "beside"
        noun = places.named(group.site).noun
        if self.starts == "zero" and beside:
            why = f"the {noun} stays as it is and the experts beside it start at zero output"
            return Certificate("exact", why)
        if self.starts != "ffn" or beside:
            why = f"the experts add to the {noun}, whose own output stays whole"
            return Certificate("none", why, None)
        return self.key.certificate(self.combine.certificate(group), group)


class OutsideKind(ExpertKind):
    """Experts that change what goes into or comes out of a whole module: those of the FFN are its
    block's, at other sites they stand beside the module and add to it.
    """

    sites = ("ffn", "attention", "cross")

    @property
    def stands(self) -> str:
        return self.base if self.verb.site == FIRST_SITE else "beside"

    @property
    def starts(self) -> str:  # type: ignore[override]
        return "ffn" if self.verb.site == FIRST_SITE else "zero"
