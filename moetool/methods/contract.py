"""What every method gives the pipeline: decisions small enough for JSON, then a plan with its
certificate, and what is said of both. Dataclasses; JSON is made once, where a file or a screen
wants it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Protocol

from moetool.data import JsonObject
from moetool.methods.field import Field, Value
from moetool.methods.options import Gate, Text, build, spelled
from moetool.methods.options import fields as fields_of
from moetool.methods.proof import Pledge, Proof
from moetool.progress import Progress, silent, unheard
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.clients import Assigned, Judged
from moetool.surgery.plan import Plan
from moetool.surgery.spec import Piece, Target, Task
from moetool.units import show_count


@dataclass(frozen=True)
class Certificate:
    """How the result relates to its source. `coverage`: of the identity c_j + sum w_e m_e (1 =
    same function).
    """

    level: str  # exact | exact_if | expectation | none
    why: str
    coverage: float | None = 1.0
    scale: float = 1.0
    place: str = "none"

    def __str__(self) -> str:
        return f"exact_if: {self.why}" if self.level == "exact_if" else self.level

    @property
    def unsound(self) -> Certificate:
        """What is left of it where a source holds NaN or inf: what goes through these is no number,
        and equals nothing.
        """
        if self.level == "none":
            return self
        return Certificate(
            "none", f"a source holds NaN or inf (else {self.level}: {self.why})", None
        )


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
    say: Callable[[str], None] = field(default=unheard, compare=False)  # before long work
    stop: threading.Event | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Decisions:
    """What a look at the sources decided: `tables` of integers for the plan, and what to tell the
    user. `chosen` is plain data that replays it; `extra` are sources beyond the named ones
    (statistics, tensors that deciding solved for).
    """

    tables: dict[str, list[int]] = field(default_factory=dict)
    report: JsonObject = field(default_factory=dict)
    memory: int = 0  # peak bytes that deciding needed, process included
    chosen: JsonObject = field(default_factory=dict)
    extra: tuple[Checkpoint, ...] = ()


@dataclass(frozen=True)
class Made:
    """A plan ready to run, and all that the report says of it."""

    plan: Plan
    certificate: Certificate
    config: JsonObject
    dropped_fields: dict[str, str]
    facts: Facts
    warnings: tuple[str, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)  # small files that go beside the weights
    beside: dict[str, str] = field(default_factory=dict)  # table -> which of `files` holds it
    promised: tuple[Pledge, ...] = ()  # matrices that are rounded: read back when written
    compared: bool = False  # its answers are held against the source's when written, and reported
    loader: str = ""  # who must load it, to be compared by value; empty: nobody is asked
    scheme: tuple[Assigned, ...] = ()  # its matrices and their forms, where the verb chose them


@dataclass(frozen=True)
class Line:
    """One line of what a verb says on the screen: `  experts      8 of width 384`."""

    label: str
    sentence: str

    def __str__(self) -> str:
        return f"  {self.label:<12} {self.sentence}"


class Facts(Protocol):
    """What one verb's report says beside what every report says; a frozen dataclass. The fields
    here stand in the model card.
    """

    @property
    def target_type(self) -> str: ...

    @property
    def experts(self) -> int | Sequence[int] | None: ...

    @property
    def top_k(self) -> int | None: ...

    @property
    def expert_width(self) -> int | None: ...

    @property
    def parameters(self) -> int: ...

    @property
    def active_parameters(self) -> int: ...

    def as_json(self) -> JsonObject:
        """The keys that stand in the report."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a mixture of experts whose layers are all alike."""

    source_type: str
    target_type: str
    layers: tuple[int, ...]
    experts: int
    top_k: int
    expert_width: int  # 0 where experts are no FFNs
    layout: str  # how experts lie: per-expert, fused; dense where there are none
    parameters: int
    active_parameters: int
    expert_sources: tuple[int, ...] = ()  # which source each expert came from
    trunks: tuple[JsonObject, ...] = ()  # how far each further source is from the first

    def as_json(self) -> JsonObject:
        """The keys that stand in the report; trunks only where there are several sources."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trunks"}
        data |= {"layers": list(self.layers), "expert_sources": list(self.expert_sources)}
        return data | ({"trunks": list(self.trunks)} if self.trunks else {})

    @staticmethod
    def of(facts: Facts) -> ModelFacts:
        """The facts of a verb that states them so."""
        assert isinstance(facts, ModelFacts)
        return facts

    def lines(self) -> list[Line]:
        """As the screen says them."""
        lie = self.layout if " " in self.layout else f"{self.layout} tensors"
        family = f"{self.source_type} -> {self.target_type} ({lie})"
        wide = f"{self.experts} of width {self.expert_width}".removesuffix(" of width 0")
        each = f"{wide}, top-{self.top_k}, in {len(self.layers)} layers"
        runs = f"{show_count(self.parameters)}, {show_count(self.active_parameters)} active"
        experts = [Line("experts", each)] if self.experts else []
        return [Line("family", family), *experts, Line("parameters", runs)]


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
    steps: tuple[Summary, ...] = ()  # what was done before, where a recipe has several steps
    clients: tuple[Judged, ...] = ()  # where it works, and where it does not

    def as_json(self) -> JsonObject:
        """One flat object, facts after what every verb says."""
        apart = ("facts", "steps", "clients")
        data = {f.name: getattr(self, f.name) for f in fields(Summary) if f.name not in apart}
        data |= {"sources": list(self.sources), "certificate": asdict(self.certificate)}
        data |= {"steps": [s.as_json() for s in self.steps]} if self.steps else {}
        data["options"] = {
            k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()
        }
        data |= {"clients": {c.client: c.as_json() for c in self.clients}} if self.clients else {}
        return data | self.facts.as_json()


@dataclass(frozen=True)
class Report(Summary):
    """A summary, and what became of it."""

    warnings: tuple[str, ...] = ()
    resumed_shards: int = 0
    seconds: float = 0.0
    ray_nodes: tuple[str, ...] = ()
    quality: JsonObject | None = None  # evaluate/perplexity.py, on text, or on random ids
    proof: Proof | None = None  # what reading back showed, where matrices were rounded
    stages: dict[str, float] | None = None  # seconds of decide, write, measure and their parts
    peak_rss: int | None = None

    @classmethod
    def of(cls, summary: Summary, **became: Any) -> Report:
        """The summary, completed."""
        return cls(**{f.name: getattr(summary, f.name) for f in fields(Summary)}, **became)

    def as_json(self) -> JsonObject:
        """What did not happen is left out."""
        found = super().as_json() | {"warnings": list(self.warnings)}
        found |= {"resumed_shards": self.resumed_shards, "seconds": self.seconds}
        optional = {
            "ray_nodes": list(self.ray_nodes),
            "quality": self.quality,
            "proof": self.proof.as_json() if self.proof else None,
            "stages": self.stages,
            "peak_rss": self.peak_rss,
        }
        return found | {k: v for k, v in optional.items() if v}


class Method:
    """A verb that writes. `options` are of `Options` (methods/options.py); ways: several.py."""

    Options: ClassVar[type]
    several: ClassVar[str] = ""  # help of --from, where a verb takes more than one source
    examples: ClassVar[tuple[str, ...]] = ()  # for --help; `demo` stands for the embedded model
    interruptible: ClassVar[bool] = False  # deciding takes long, and can be stopped after a layer
    lays: ClassVar[bool] = False  # it says itself how experts lie
    reads_groups: ClassVar[bool] = False  # also sources with experts that no stock class holds
    takes_out: ClassVar[bool] = False  # of a source that is more than a language model, this alone

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
        return cls(build(cls.Options, values, spelled(cls)))

    def recorded(self) -> dict[str, Value]:
        """All options, flat: `make` of them gives the same method again."""
        return {f.name: getattr(self.options, f.name) for f in fields_of(type(self.options))}

    @property
    def gate(self) -> Gate | None:
        """What is measured on the staged output before it gets its name; None: nothing."""
        return None

    @property
    def text(self) -> Text:
        """How text is read and cut, for the gate as for deciding."""
        return self.options if isinstance(self.options, Text) else Text()

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Look at the sources; numbers small enough for JSON."""
        raise NotImplementedError

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """The plan and its certificate; every refusal that needs only headers happens here."""
        raise NotImplementedError

    def stands_for_ffns(self, made: Made) -> bool:
        """Whether each MoE block was made of an FFN of the source: then `verify` compares them."""
        return False

    def lines(self, summary: Summary) -> list[Line]:
        """What the verb says on the screen, between `SRC -> OUT` and the lines common to all."""
        return []

    def notes(self, summary: Summary) -> list[Line]:
        """What it says after them."""
        return []

    def card(self, report: Report) -> list[str]:
        """What the model card says of this verb, a sentence each; by default what was left out."""
        return [f"left out: `{name}` ({why})" for name, why in left_out(report).items()]

    def files(self, report: Report) -> dict[str, bytes]:
        """Small files beside the weights, once everything is known (report.json, ...)."""
        return {}


def left_out(summary: Summary) -> dict[str, str]:
    """Tensors and config fields that the output does not hold, and why."""
    config = {f"config.{name}": why for name, why in summary.dropped_fields.items()}
    return {**summary.dropped_tensors, **config}


class Builder:
    """Collects targets and tasks in the order in which they will lie on disk."""

    def __init__(self) -> None:
        self.targets: list[Target] = []
        self.tasks: list[Task] = []

    def target(self, name: str, dtype: str, shape: tuple[int, ...]) -> Target:
        """Announce an output tensor."""
        self.targets.append(Target(name, dtype, shape))
        return self.targets[-1]

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
        given = {k: v for k, v in params.items() if v is not None}
        self.tasks.append(Task(op, tuple(inputs), tuple(outputs), given))
