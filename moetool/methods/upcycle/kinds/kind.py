"""What a kind of experts is: one class in one file of this folder; it shows up by itself.

A kind says where its experts stand (`base`), what they compute at birth (`starts`), has `Options`
of its own, and writes the tensors of one layer. Nothing heavy is imported here: `--help` reads all
kinds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from moetool import discover
from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate, Decisions, Settings
from moetool.methods.options import fields
from moetool.methods.several import Nothing
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.options import LAWS, Upcycling
from moetool.methods.upcycle.route import Router
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import MODEL_TYPE, Group, Route
from moetool.surgery.reform import Into
from moetool.surgery.spec import Piece

# Options of upcycle that mean the same to experts of any kind.
_COMMON = ("experts", "top_k", "layers", "target", "router", "law", "form", "for_", "site")
SUMMING = ("renormalised", "soft")  # laws whose weights sum to one


class ExpertKind:
    """Subclass it in a file of this folder; the first sentence of its docstring describes it.
    `starts`: what an expert computes at birth: `ffn` (what the layer's FFN does), `zero`, or `near`
    (something like it).
    """

    name: ClassVar[str] = ""
    Options: ClassVar[type] = Nothing
    base: ClassVar[str] = "under"
    starts: str = "ffn"
    law: ClassVar[str] = "renormalised"  # what --law auto means
    takes: ClassVar[tuple[str, ...]] = ()  # options of upcycle beyond those that all kinds take
    several: ClassVar[bool] = False  # whether --from means anything
    sites: ClassVar[tuple[str, ...]] = ("ffn",)  # where such experts can stand

    def __init__(self, verb: Upcycling, own: Any = None) -> None:
        self.verb = verb
        self.own: Any = own if own is not None else self.Options()
        self.found = Decisions()

    @classmethod
    def known(cls) -> Mapping[str, type[ExpertKind]]:
        """name -> kind, in name order."""
        return _known()

    @classmethod
    def about(cls) -> str:
        """Its docstring on one line."""
        return " ".join((cls.__doc__ or "").split())

    @classmethod
    def line(cls) -> str:
        """The first words of it."""
        return cls.about().partition(":")[0].partition(",")[0]

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
                hint=f"leave out --{field.spelled}: the FFN stays whole, and experts stand "
                f"{self.base} it",
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
        if self.base != "beside" and self.chosen_law == "hard" and self.verb.top_k != 1:
            raise UsageError(
                "--law hard gives each chosen expert the weight 1: two of them are twice the FFN",
                expected="--top-k 1",
                found=f"--top-k {self.verb.top_k}",
                hint="use --top-k 1, or --law renormalised",
            )

    def _at_site(self) -> None:
        if self.verb.site not in self.sites:
            raise UsageError(
                f"no experts of this form stand at the site {self.verb.site}",
                expected=f"{self.spelled} with --site {', '.join(self.sites)}",
                found=f"{self.spelled} --site {self.verb.site}",
                hint="`moetool methods show upcycle` says what goes with it",
            )

    def _native(self) -> None:
        self._at_site()
        if self.verb.law != LAWS[0]:
            raise UsageError(
                "--law is the target's own where a stock class holds the experts",
                expected=f"--form {', '.join(self.known())}",
                found=f"--law {self.verb.law} alone",
                hint="leave out --law",
            )

    @property
    def chosen_law(self) -> str:
        return self.law if self.verb.law == LAWS[0] else self.verb.law

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

    def check(self, ground: Ground) -> None:
        """Refuse a model that cannot have such experts, from headers alone."""

    def params(self, ground: Ground) -> JsonObject:
        """What the config says of the experts' form."""
        return {}

    def group(self, ground: Ground) -> Group:
        """What the config says of all."""
        law, said = self.chosen_law, self.verb
        top_k = said.experts if law == "soft" else said.top_k
        return Group(
            form=self.name,
            experts=said.experts,
            layers=ground.layers,
            base=self.base,
            params=self.params(ground),
            site=said.site,
            route=Route(law=law, top_k=top_k),
        )

    def router(self, build: Builder, spot: Spot) -> Piece | None:
        """Where the router of a layer lies that is there already."""
        return None

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        """Plan the tensors of a layer's experts; the forms of those that are encoded."""
        raise NotImplementedError

    def certificate(self, group: Group, sources: int) -> Certificate:
        """How the result relates to its source at birth. `sources`: how many there are."""
        law, beside = group.route.law, group.base == "beside"
        if self.starts == "zero" and beside:
            why = "the FFN stays as it is and the experts beside it start at zero output"
            return Certificate("exact", why)
        if self.starts != "ffn" or beside:
            why = "the experts add to the FFN, whose own output stays whole"
            return Certificate("none", why, None)
        total = law in SUMMING or group.route.top_k in (group.experts, 1 if law == "hard" else -1)
        if total and not (law == "hard" and group.route.top_k > 1):
            why = "every expert starts as the FFN and the combine weights sum to one"
            return Certificate("exact", f"{why}, whatever the router says")
        why = f"under --law {law} the weights of the chosen experts do not sum to one"
        return Certificate("none", why, None)


@lru_cache(maxsize=1)
def _known() -> Mapping[str, type[ExpertKind]]:
    import moetool.methods.upcycle.kinds

    return discover.classes(sys.modules[moetool.methods.upcycle.kinds.__name__], ExpertKind)
