"""What upcycle can be told."""

from __future__ import annotations

from dataclasses import dataclass

from moetool.errors import UsageError
from moetool.methods import site
from moetool.methods.field import WHAT
from moetool.methods.options import Served, Storing, option
from moetool.methods.upcycle import carve
from moetool.methods.upcycle.diversify import Diversify
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.methods.upcycle.laws.law import RouteLaw
from moetool.methods.upcycle.route import Router
from moetool.methods.upcycle.word import listed, words
from moetool.surgery import places, towers
from moetool.surgery.groups import MOST
from moetool.surgery.route import ROUTED

AUTO = "auto"


def _keys() -> str:
    """What --key may say."""
    return f"what routes look at, where no stock class has such experts: {listed(RouteKey)}"


def _laws() -> str:
    """What --law may say."""
    return f"with --form lora, ternary, ...: how scores become weights: {listed(RouteLaw)}"


@dataclass(frozen=True)
class Upcycling(Storing, Served):
    """The options of upcycle, seven primitives in short."""

    experts: int = option(8, "routed experts in each MoE layer", WHAT)
    top_k: int = option(0, "experts that run for a token; 0: as is usual", WHAT, minimum=0)
    split: int = option(
        1, "cut each FFN into this many parts; experts = parts x replicas", WHAT, metavar="PARTS"
    )
    layers: str = option(
        "all", f"which layers get experts: {site.FORMS}", WHAT, metavar="all|every:N|0,2,..."
    )
    site: str = option(
        "ffn",
        lambda: (
            "which module of a layer gets experts: "
            + "; ".join(f"{name}: {place.about()}" for name, place in places.known().items())
        ),
        WHAT,
        choices=lambda: tuple(places.known()),
    )
    linears: str = option(
        "",
        "with --site linear: those that get experts, by their names; all of attention and FFN where "
        "not said",
        WHAT,
        metavar="q_proj,...",
    )
    name: str = option(
        "",
        "what the group of experts is called, with --form or --site; SRC may have groups already: "
        "experts, or experts_2 where one is called so",
    )
    tower: str = option(
        towers.AUTO,
        "with --form: which stack of layers gets experts; auto: the text model, or the only one",
        WHAT,
        choices=(towers.AUTO, *towers.KNOWN),
    )
    target: str = option(
        "auto",
        "model type to write, or auto (the first that loses nothing); with --layers none: same",
        WHAT,
        metavar="FAMILY",
    )
    layout: str = option(
        "auto",
        "how expert tensors lie; auto is per-expert wherever the family reads it",
        choices=("auto", "per-expert", "fused"),
    )
    router: str = option(
        "auto",
        "how the router starts: zero, normal:SIGMA, kaiming, uniform:SIGMA, group:SIGMA",
        metavar="START",
    )
    key: str = option(
        ROUTED,
        _keys,
        WHAT,
        choices=lambda: tuple(words(RouteKey)),
    )
    law: str = option(
        AUTO,
        _laws,
        choices=lambda: (AUTO, *words(RouteLaw)),
    )
    carve: str = option(
        "contiguous", f"how --split chooses neurons: {carve.FORMS}", metavar="random|kmeans|..."
    )
    diversify: str = option(
        "none",
        "what makes copies differ: none, permute, noise:SIGMA, drop:RATIO[:reference], mask:SHARE "
        "(entries that become zero), joined by +",
        metavar="noise:SIGMA|...",
    )
    shared: bool = option(
        False,
        "keep the whole FFN as an always-on shared expert; routed experts start at zero output, or "
        "as they are times --scale",
        WHAT,
    )
    scale: str = option(
        "auto", "factor on expert outputs; auto solves the coverage identity", metavar="FACTOR"
    )
    trunk: str = option(
        "base",
        "everything but the FFNs, with --from: base, mean, weights:a,b,... or interp:x",
        WHAT,
        metavar="base|mean|...",
    )
    expert_map: str = option(
        "",
        "source of each expert (0 is SRC, 1 the first --from), for example 0,1,1,2",
        WHAT,
        metavar="0,1,...",
    )

    def __post_init__(self) -> None:
        if self.carve not in carve.BY_TEXT:  # there parts are shared that are no experts
            self._check_counts()
        carve.parse(self.carve, self.split)
        Diversify.parse(self.diversify)
        if self.name and not self.name.isidentifier():
            raise UsageError(
                "--name is no name for a module",
                expected="letters, digits and _",
                found=self.name,
                hint="for example --name images",
            )
        Router.parse(self.router, self.split, self.top_k, self.experts)

    def _check_counts(self) -> None:
        if self.experts < 1 or self.split < 1:
            raise UsageError(
                "--experts and --split are at least 1",
                found=f"{self.experts}, {self.split}",
                hint="for example --experts 8 --top-k 2",
            )
        if self.experts > MOST:
            raise UsageError(
                "more experts than any family can be loaded with",
                expected=f"at most {MOST:,}",
                found=f"{self.experts:,}",
                hint="for example --experts 64",
            )
        if self.top_k > self.experts:
            raise UsageError(
                "more experts run than there are",
                expected=f"--top-k at most {self.experts}",
                found=self.top_k,
                hint="raise --experts or lower --top-k",
            )
        if self.experts % self.split and not self._discards:
            raise UsageError(
                "--experts must be a multiple of --split",
                expected=f"a multiple of {self.split}",
                found=self.experts,
                hint=f"for example --experts {self.split * max(1, round(self.experts / self.split))}",
            )

    @property
    def _discards(self) -> bool:
        """Whether what is left of the last copy may be discarded."""
        return self.carve == carve.SHUFFLED and self.experts >= self.split

    @property
    def silent(self) -> bool:
        """Whether experts start at zero output: beside a shared one, unless --scale says what is
        theirs.
        """
        return self.shared and self.scale == AUTO
