"""What a plan of fewer experts is made from, and what comes of it: values that ways and the cut
share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from moetool.data import JsonObject
from moetool.methods.contract import Builder, Certificate, Settings
from moetool.methods.reduce.decided import Decided
from moetool.methods.reduce.decision import Decision
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.plan import Plan
from moetool.surgery.spec import Piece


@dataclass(frozen=True)
class Writing:
    """What a plan is made from. `tables`: neuron orders by name; `extra`: sources beside the model,
    those that `Way.sources` gave.
    """

    mixture: Mixture
    decided: Decided
    tables: Mapping[str, list[int]]
    extra: tuple[Checkpoint, ...]
    settings: Settings


@dataclass(frozen=True)
class Planned:
    """A plan, how it relates to the source, and in what form the experts are counted (uniform,
    zeroed, ghost, ragged, or a way's own).
    """

    plan: Plan
    certificate: Certificate
    counts: str


@dataclass(frozen=True)
class Cluster:
    """Everything a maker of experts needs: the members' pieces by role, their weights, where they
    lie, and what deciding solved for the new expert, by role.
    """

    layer: int
    number: int
    members: tuple[int, ...]
    weights: tuple[float, ...]
    pieces: tuple[dict[str, Piece], ...]
    form: JsonObject
    solved: Mapping[str, Piece] = field(default_factory=dict)


class Maker(Protocol):
    """Plans experts that are no copies."""

    def makes(self, decision: Decision, members: tuple[int, ...]) -> bool:
        """Whether this expert of the output is one of them."""
        ...

    def make(self, build: Builder, cluster: Cluster, outs: Mapping[str, Piece]) -> None:
        """Plan it: `outs` are the output's pieces by role."""
        ...
