"""What a way of reducing experts is. One class in one file of its own; it shows up by itself.

A way says what it `needs`, has `Options` of its own, and defines what differs: `score` or `choose`
(a layer's decision), `finish` (once all layers are decided), `block` (the changed layer in memory),
`sources` and `write` (the plan). Nothing heavy is imported here: `--help` reads all ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from moetool import discover
from moetool.data import JsonMapping, JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Certificate, Line
from moetool.methods.reduce.options import Reducing
from moetool.methods.several import Nothing

if TYPE_CHECKING:
    import numpy as np

    from moetool.forward.block import Block
    from moetool.forward.stats import LayerStats
    from moetool.methods.reduce.decided import Decided
    from moetool.methods.reduce.decision import Decision
    from moetool.methods.reduce.view import View
    from moetool.methods.reduce.writing import Maker, Planned, Writing
    from moetool.surgery.checkpoint import Checkpoint
    from moetool.surgery.experts import Mixture

Kind = TypeVar("Kind", bound="Way")


@dataclass(frozen=True)
class Needs:
    """What deciding a layer looks at. text: statistics of experts on text; sample: inputs of the
    block, kept (--sample says how many); dense: the outputs of all experts on them; covariance:
    second moments of inputs; weights: the layer's weights; buffers: bytes held beside the block;
    gains: statistics are not needed, but looked at where there is text.
    """

    text: bool = True
    sample: bool = False
    dense: bool = False
    covariance: bool = False
    weights: bool = False
    buffers: int = 0
    gains: bool = False


class Way:
    """Subclass it (through PruneWay or MergeWay) in a file of prune/ or merge/; the first sentence
    of its docstring describes it. `auto`: "text" when --method auto means it, "no text" when it
    does and nothing can run.
    """

    name: ClassVar[str] = ""
    auto: ClassVar[str] = ""
    Options: ClassVar[type] = Nothing
    needs: Needs = Needs()
    router: str = "centroid"  # which row a new expert gets (reduce/cut.py)
    # what its plans write of a decision beyond `keep`, as the file names it
    writes: ClassVar[frozenset[str]] = frozenset()
    # it can be decided and written only from statistics of all layers as they were
    one_profile: ClassVar[bool] = False
    # down matrices of its experts can be solved again
    solvable: ClassVar[bool] = True
    copies: ClassVar[bool] = False  # what stays it leaves as it lies
    solves: ClassVar[bool] = False  # it solves what it writes, whether there is a refit or not
    chance: ClassVar[bool] = False  # the control that every other way is held against
    apart: ClassVar[str] = ""  # why what it keeps cannot be compared with other ways

    def __init__(self, verb: Any, own: Any = None, named: type[Way] | None = None) -> None:
        self.verb: Any = verb  # the verb's options: Reducing and what the verb adds
        self.own: Any = own if own is not None else self.Options()
        self.named: type[Way] = named or type(self)  # what --method said

    @classmethod
    def acting(cls, verb: Any) -> type[Way]:
        """The class that runs when --method means this one: another where an option asks for what
        only that one can do.
        """
        return cls

    @classmethod
    def about(cls) -> str:
        """Its docstring on one line."""
        return " ".join((cls.__doc__ or "").split())

    @classmethod
    def needs_text(cls) -> bool:
        """Whether it cannot do without text."""
        return cls.needs.text

    @property
    def called(self) -> str:
        """The name that decisions and reports carry."""
        return self.named.name

    @property
    def options(self) -> Reducing:
        """The verb's options as this way runs them."""
        options: Reducing = self.verb
        return options

    def told(self) -> None:
        """Refuse options that do not go together."""

    def check_walk(self) -> None:
        """Refuse --propagate and --refit where a walk that changes layers cannot keep what the plan
        reads.
        """
        if self.one_profile and (self.options.propagate or self.options.refit):
            raise UsageError(
                f"--method {self.name} works from one profile",
                hint="leave out --propagate and --refit",
            )

    def notes(self, mixture: Mixture) -> list[str]:
        """What the user must be told before anything is decided."""
        return []

    def check(self, mixture: Mixture) -> None:
        """Refuse a model that this way cannot reduce, from headers alone."""

    def buffers(self, mixture: Mixture) -> int:
        """Bytes that deciding a layer of this model holds beside its block."""
        return self.needs.buffers

    @property
    def scores(self) -> Callable[[View], np.ndarray] | None:
        """A score by which layers can be compared ([experts], high = needed), if there is one."""
        return None

    def choose(self, view: View, count: int) -> Decision:
        """The decision for a layer that keeps `count` experts."""
        raise NotImplementedError

    def finish(
        self, layers: dict[int, Decision], view: Callable[[int], View]
    ) -> dict[int, Decision]:
        """All layers once more, when each is decided (not inside a walk)."""
        return layers

    def block(self, view: View, decision: Decision, block: Block) -> Block:
        """The layer's new block, with the very values that the plan will write."""
        return block.with_experts(decision.leads)

    @classmethod
    def known(cls) -> Mapping[str, type[Way]]:
        """All ways of the same verb, by name."""
        raise NotImplementedError

    def writer(self, decided: Decided) -> Way:
        """Who plans these decisions: this way, or the one that alone can."""
        claiming = [way for way in self.known().values() if way.claims(decided)]
        return self if not claiming or type(self) in claiming else claiming[0](self.verb)

    @classmethod
    def claims(cls, decided: Decided) -> bool:
        """Whether only this way can write such decisions, whoever replays them."""
        return False

    def reads(self, decided: Decided) -> bool:
        """Whether the plan of these decisions reads statistics beside the model."""
        return self.needs.covariance or self.claims(decided)

    def kept(self, stats: LayerStats) -> dict[str, np.ndarray]:
        """What the plan reads of a layer's statistics, where a walk keeps them only so long."""
        names = ("in_cov", "mid_cov") if self.needs.covariance else ()
        return {name: stats.arrays[name] for name in names}

    def sources(
        self, mixture: Mixture, decided: Decided, stats: str, work: str
    ) -> tuple[Checkpoint, ...]:
        """What the plan reads beside the model, of the statistics in the folder `stats`; tensors
        made from them go to the folder `work`.
        """
        from moetool.methods.reduce.beside import stats_source

        return (stats_source(stats),) if self.reads(decided) else ()

    def maker(self, writing: Writing) -> Maker | None:
        """How experts are made that are no copies."""
        return None

    def write(self, writing: Writing) -> Planned:
        """The plan; every refusal that needs only headers happens here."""
        from moetool.methods.reduce import uneven
        from moetool.methods.reduce.cut import Cutter
        from moetool.methods.reduce.writing import Planned

        how = uneven.of(writing.mixture, self.options)
        cutter = Cutter(writing, how, self.router, self.maker(writing))
        plan = cutter.plan(self.options.form)
        return Planned(plan, self.certificate(writing), cutter.uneven)

    def certificate(self, writing: Writing) -> Certificate:
        """How the result relates to its source."""
        raise NotImplementedError

    def facts(self, mixture: Mixture) -> JsonObject:
        """What the report says of this way alone."""
        return {}

    @classmethod
    def lines(cls, facts: JsonMapping) -> list[Line]:
        """What the screen says of those facts."""
        return []


def refuse_quantized(mixture: Mixture, why: str) -> None:
    """Merging and sending text need float experts."""
    if not mixture.plain:
        raise MoetoolError(
            f"{why} needs experts in floating point",
            file=mixture.source.folder,
            found="quantized experts",
            expected="float weights",
            hint="prune without text works on quantized experts: --method router-distance",
        )


@lru_cache(maxsize=8)
def ways(package: ModuleType, base: type[Kind]) -> dict[str, type[Kind]]:
    """name -> class of every way in a package's files."""
    return discover.classes(package, base)


def meant_by_auto(known: Mapping[str, type[Kind]], *, text: bool) -> type[Kind]:
    """The way that --method auto stands for."""
    wanted = "text" if text else "no text"
    return next(way for way in known.values() if way.auto == wanted)


def auto_help(known: Mapping[str, type[Way]]) -> str:
    """`auto (reap, without text on what the model writes itself), or one of: ...`"""
    meant = meant_by_auto(known, text=True).name
    return f"auto ({meant}, without text on what the model writes itself), or one of: {', '.join(known)}"
