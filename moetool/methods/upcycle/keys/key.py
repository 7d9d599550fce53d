"""What a key of a route is: one class in one file of this folder; it shows up by itself.

Nothing heavy is imported here: `--help` reads all keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder, Certificate
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.laws.law import RouteLaw
from moetool.methods.upcycle.route import Router
from moetool.methods.upcycle.word import Word, words
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import FIRST_SITE, TEXT, Group
from moetool.surgery.route import KEYS, RouterTensor
from moetool.surgery.spec import Target, whole

WIDEST = 1 << 20  # of a router's inner layers


class RouteKey(Word):
    """Subclass it in a file of this folder; the first sentence of its docstring describes it.
    `top_k`: experts of a token where nothing is said (0: as the form has it); `keeps`: whether the
    FFN itself is the first choice where experts are whole copies of it; `sites`: where it is;
    `apart`: whether each token has scores of its own; `laws`: those that it goes with (empty: all);
    `draws`: whether --router says how it starts.
    """

    top_k: ClassVar[int] = 0
    keeps: ClassVar[bool] = False
    sites: ClassVar[tuple[str, ...]] = ("ffn",)
    apart: ClassVar[bool] = True
    laws: ClassVar[tuple[str, ...]] = ()
    draws: ClassVar[bool] = True

    def __init__(self, own: Any = None) -> None:
        self.own: Any = own if own is not None else self.Options()

    @property
    def bias(self) -> bool:
        """Whether its routers add one."""
        return False

    @classmethod
    def law(cls, usual: str, base: str) -> str:
        """What --law auto means, where a form has a usual one and stands on a base."""
        return usual

    @classmethod
    def most(cls, top_k: int, experts: int) -> int:
        """Experts of a token, where nothing is said and a form has so many."""
        return cls.top_k or top_k

    def told(self, site: str, law: RouteLaw) -> None:
        """Refuse a place or a law that it does not go with."""
        if site not in self.sites:
            known = words(RouteKey).items()
            fitting = ", ".join(f"--key {name}" for name, key in known if site in key.sites)
            raise UsageError(
                f"--key {self.name} looks at what {site} has not",
                expected=f"--site {' or '.join(self.sites)}",
                found=f"--key {self.name} at {site}",
                hint=f"with --site {site} go {fitting}",
            )
        if law.apart and site != FIRST_SITE:
            raise UsageError(
                f"--law {law.name} leaves tokens without an expert, and {site} needs one",
                expected=f"--site {FIRST_SITE}, or another --law",
                found=f"--law {law.name} --site {site}",
                hint="leave out --law",
            )
        wrong = law.apart and not self.apart
        if wrong or (self.laws and law.name not in self.laws):
            goes = f"--law {' or '.join(self.laws)}" if self.laws else "another --law"
            raise UsageError(
                f"--law {law.name} chooses by what --key {self.name} does not tell apart",
                expected=f"--key {self.name} with {goes}",
                found=f"--key {self.name} --law {law.name}",
                hint="leave out --law",
            )

    def check_tower(self, tower: str) -> None:
        """Refuse a tower that the caller's tokens do not go through, where it looks at these."""
        key = KEYS[self.name]
        if not key.in_tower(tower):
            raise UsageError(
                f"--key {self.name} looks at what a call of the text model says",
                expected=f"--tower {' or '.join(key.alone or (TEXT,))}",
                found=f"--tower {tower}",
                hint="in another tower, leave out --key: each patch or token is routed by itself",
            )

    def check(self, ground: Ground, choices: int, top_k: int) -> None:
        """Refuse a model that has not what it looks at, from headers alone."""

    def options(self, ground: Ground, choices: int, top_k: int) -> JsonObject:
        """What the config says of it."""
        return {}

    def write(self, build: Builder, spot: Spot, start: Router) -> None:
        """Plan the router of a layer, as --router says it starts."""
        for tensor in spot.group.router_tensors:
            self.one(build, spot, tensor, start)

    def one(self, build: Builder, spot: Spot, tensor: RouterTensor, start: Router) -> None:
        """One tensor of it."""
        target = self.target(build, spot, tensor)
        if tensor.start == "zero" or start.law == "zero":
            build.zeros(target)
        else:
            build.task("draw", [], [whole(target)], **start.params(spot.seed, target.name))

    def target(self, build: Builder, spot: Spot, tensor: RouterTensor) -> Target:
        """Announce one."""
        name = f"{spot.module}.{spot.group.router}.{tensor.name}"
        return build.target(name, spot.ground.dtype, tensor.sides(spot.seen))

    def files(self, work: str) -> tuple[Checkpoint, ...]:
        """Tensors of its own that it was given, as files in a folder of this run's; UsageError
        where it lacks them.
        """
        return ()

    def attach(self, extra: Sequence[Checkpoint], sources: int) -> None:
        """Plan with what was decided: these files, behind so many sources."""

    def certificate(self, made: Certificate, group: Group) -> Certificate:
        """What it changes of a certificate: nothing, for most."""
        return made
