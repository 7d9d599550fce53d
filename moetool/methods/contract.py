"""What every method gives the pipeline: decisions small enough for JSON, then a plan with
its certificate.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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
    tell: Callable[[str, int, int], None] = field(default=lambda *a: None, compare=False)
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
    facts: dict[str, Any]
    warnings: tuple[str, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)  # small files that go beside the weights


class Method(Protocol):
    """A frozen dataclass whose fields are its options."""

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions: ...

    def plan(
        self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings
    ) -> Made: ...


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
