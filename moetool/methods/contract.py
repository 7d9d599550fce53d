"""What every method gives the pipeline: decisions small enough for JSON, then a plan with
its certificate.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Protocol

from moetool.methods.options import Field, Gate, Value
from moetool.methods.options import fields as fields_of
from moetool.progress import Progress, silent
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.plan import Plan
from moetool.surgery.spec import Piece, Target, Task


@dataclass(frozen=True)
class Certificate:
    """How the result relates to its source. `coverage` is the value of the identity c_j + sum w_e
    m_e (1 = same function).
    """

    level: str  # exact | exact_if | expectation | none
    why: str
    coverage: float | None = 1.0
    scale: float = 1.0
    place: str = "none"

    def __str__(self) -> str:
        return f"exact_if: {self.why}" if self.level == "exact_if" else self.level


@dataclass(frozen=True)
class Settings:
    """What the user says to every method."""

    seed: int = 0
    max_shard: int = 5_000_000_000
    device: str = "cpu"
    memory: int | None = None
    work: str = ""  # a folder for what long deciding leaves behind until the output is there
    dry_run: bool = False
    tell: Progress = field(default=silent, compare=False)
    stop: threading.Event | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Decisions:
    """What a look at the sources decided: `tables` of integers for the plan, and what to tell the
    user. `chosen` is plain data that replays it; `extra` are sources beyond the named ones
    (statistics, tensors that deciding solved for).
    """

    tables: dict[str, list[int]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    memory: int = 0  # peak bytes that deciding needed, process included
    chosen: dict[str, Any] = field(default_factory=dict)
    extra: tuple[Checkpoint, ...] = ()


@dataclass(frozen=True)
class Made:
    """A plan ready to run, and all that the report says of it."""

    plan: Plan
    certificate: Certificate
    config: dict[str, Any]
    dropped_fields: dict[str, str]
    facts: dict[str, Any] | Facts
    warnings: tuple[str, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)  # small files that go beside the weights


@dataclass(frozen=True)
class Line:
    """One line of what a verb says on the screen: `  experts      8 of width 384`."""

    label: str
    sentence: str

    def __str__(self) -> str:
        return f"  {self.label:<12} {self.sentence}"


class Facts(Protocol):
    """What one verb's report says beside what every report says; a frozen dataclass."""

    def as_json(self) -> dict[str, Any]:
        """The keys that stand in the report."""
        ...


@dataclass(frozen=True)
class Summary:
    """What is known of an output before its first byte is written."""

    sources: tuple[str, ...]
    out: str
    method: str
    options: dict[str, Value]
    seed: int
    certificate: Certificate
    output_bytes: int
    tensors: int
    shards: int
    read_bytes: int
    peak_memory: int
    jobs: int
    free_disk: int
    plan_digest: str
    dropped_tensors: dict[str, str]
    dropped_fields: dict[str, str]
    facts: Facts

    def as_json(self) -> dict[str, Any]:
        """One flat object, facts among the other keys."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "facts"}
        data |= {"sources": list(self.sources), "certificate": asdict(self.certificate)}
        return data | self.facts.as_json()


@dataclass(frozen=True)
class Report(Summary):
    """A summary, and what became of it."""

    warnings: tuple[str, ...] = ()
    resumed_shards: int = 0
    seconds: float = 0.0
    ray_nodes: tuple[str, ...] = ()
    quality: dict[str, Any] | None = None  # evaluate/perplexity.py, where there was text for it
    stages: dict[str, float] | None = None  # seconds of decide, write, measure
    peak_rss: int | None = None

    def as_json(self) -> dict[str, Any]:
        """What did not happen is left out."""
        found = super().as_json() | {"warnings": list(self.warnings)}
        found["ray_nodes"] = list(self.ray_nodes)
        optional = ("ray_nodes", "quality", "stages", "peak_rss")
        return {k: v for k, v in found.items() if k not in optional or v}


class Method:
    """A verb that writes. `options` is an instance of `Options` (moetool/methods/options.py); verbs
    with several ways (prune, merge) hold one as well.
    """

    Options: ClassVar[type]
    several: ClassVar[str] = ""  # help of --from, where a verb takes more than one source
    examples: ClassVar[tuple[str, ...]] = ()  # for --help; `demo` stands for the embedded model
    interruptible: ClassVar[bool] = False  # deciding takes long, and can be stopped after a layer

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    def ways(cls) -> Mapping[str, type[Any]]:
        """name -> class of each way (empty: the verb is its only way). Imports no numpy."""
        return {}

    @classmethod
    def fields(cls) -> tuple[Field, ...]:
        """Everything the verb can be told: its own options, then those of its ways."""
        return fields_of(cls.Options)

    @classmethod
    def make(cls, values: Mapping[str, object]) -> Method:
        """The verb with these options, from any origin; UsageError for what does not fit."""
        raise NotImplementedError

    def recorded(self) -> dict[str, Value]:
        """All options, flat: `make` of them gives the same method again."""
        return {f.name: getattr(self.options, f.name) for f in fields_of(type(self.options))}

    @property
    def gate(self) -> Gate | None:
        """What is measured on the staged output before it gets its name; None: nothing."""
        return None

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Look at the sources; numbers small enough for JSON."""
        raise NotImplementedError

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """The plan and its certificate; every refusal that needs only headers happens here."""
        raise NotImplementedError

    def lines(self, summary: Summary) -> list[Line]:
        """What the verb says on the screen, between `SRC -> OUT` and the lines common to all."""
        return []

    def files(self, report: Report) -> dict[str, bytes]:
        """Small files beside the weights, once everything is known (report.json, ...)."""
        return {}


class Builder:
    """Collects targets and tasks in the order in which they will lie on disk."""

    def __init__(self) -> None:
        self.targets: list[Target] = []
        self.tasks: list[Task] = []

    def target(self, name: str, dtype: str, shape: tuple[int, ...]) -> Target:
        """Announce an output tensor."""
        made = Target(name, dtype, shape)
        self.targets.append(made)
        return made

    def copy(self, piece: Piece, out: Piece) -> None:
        """Bytes as they are."""
        self.tasks.append(Task("copy", (piece,), (out,)))

    def zeros(self, target: Target) -> None:
        """All of a tensor zero."""
        self.tasks.append(Task("zeros", (), (Piece(target.name, target.shape),)))

    def task(
        self, op: str, inputs: Sequence[Piece], outputs: Sequence[Piece], **params: Any
    ) -> None:
        """Any other operation; parameters that are None are left out."""
        self.tasks.append(
            Task(
                op,
                tuple(inputs),
                tuple(outputs),
                {k: v for k, v in params.items() if v is not None},
            )
        )
