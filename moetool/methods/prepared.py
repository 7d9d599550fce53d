"""One command that writes: what was asked of it, and everything known of its plan before the first
byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moetool.data import JsonObject
from moetool.lock import Lock
from moetool.methods.contract import Made, Method
from moetool.methods.options import Common
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.clients import Judged
from moetool.surgery.plan import Plan


@dataclass(frozen=True)
class Step:
    """A verb, and what it was told."""

    method: str
    values: Mapping[str, object] = field(default_factory=dict)
    further: bool = False  # after another step: whether it reads the command's sources[1:] too


@dataclass(frozen=True)
class Options:
    """One command that writes: from where to where, by which verb, after which others."""

    out: str
    sources: tuple[str, ...]
    method: str
    values: Mapping[str, object] = field(default_factory=dict)  # the verb's own options
    common: Common = field(default_factory=Common)
    command: str = ""  # as it was typed, for the model card
    before: tuple[Step, ...] = ()  # where a recipe has several
    further: bool = False  # with steps before: as of a step


@dataclass(frozen=True)
class Prepared:
    """A plan with everything known of it before the first byte is written."""

    options: Options
    method: Method
    sources: tuple[Checkpoint, ...]  # the named ones, then what deciding left
    made: Made
    chosen: JsonObject  # what was decided: replays it
    jobs: int
    peak: int  # promised bytes of memory
    done: bool = False  # the output is already there, whole, from this very plan
    work: str = ""  # folder of what long deciding left
    decided_in: float = 0.0  # seconds
    stages: dict[str, float] = field(default_factory=dict)  # of deciding
    lock: Lock | None = None  # of the work folder, until the output is written
    before: tuple[Prepared, ...] = ()  # earlier steps; what the last would write is sources[0]
    clients: tuple[Judged, ...] = ()  # what they make of the output

    @property
    def plan(self) -> Plan:
        return self.made.plan

    @property
    def named(self) -> int:
        """How many of `sources` came first, before what deciding left."""
        return 1 if self.before and not self.options.further else len(self.options.sources)

    @property
    def origins(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that the user named."""
        return self.before[0].origins if self.before else self.sources[: self.named]

    @property
    def names(self) -> tuple[str, ...]:
        """The sources as the user named them."""
        return self.options.sources
