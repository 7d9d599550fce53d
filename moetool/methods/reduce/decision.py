"""What was decided of one layer's experts: small, plain data, to be read, edited and replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moetool.errors import UsageError, did_you_mean

_KEYS = {"keep", "groups", "weights", "scores", "protected", "constant", "sparsity", "orders"}


@dataclass(frozen=True)
class Decision:
    """A layer: new expert j is made from the old experts groups[j] with weights[j] (summing to 1); the
    first of a group leads: its name order and, by default, its router row. `constant`: experts
    that stay as constants (MoNE).
    """

    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...] = ()
    scores: tuple[float, ...] = ()
    protected: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()
    sparsity: float = 0.0  # share of each kept matrix's weights that is zeroed as well (STUN)
    orders: Mapping[int, tuple[int, ...]] = field(
        default_factory=dict
    )  # a merged expert's neurons in its lead's order

    @classmethod
    def keep(cls, experts: Sequence[int], **more: Any) -> Decision:
        """These experts stay as they are, the others go."""
        return cls(tuple((int(e),) for e in sorted(experts)), **more)

    @property
    def count(self) -> int:
        return len(self.groups)

    @property
    def leads(self) -> list[int]:
        return [g[0] for g in self.groups]

    def weight(self, group: int) -> tuple[float, ...]:
        """Weights of a group, uniform where none are given."""
        return (
            self.weights[group]
            if self.weights
            else (1.0 / len(self.groups[group]),) * len(self.groups[group])
        )

    def whole(self, experts: int) -> bool:
        """Whether all of a layer's experts stay as they are."""
        return self.count == experts and not self.constant and not self.sparsity

    def map(self, experts: int) -> list[int | None]:
        """old expert -> new expert, None where it went."""
        to: list[int | None] = [None] * experts
        for new, members in enumerate(self.groups):
            for old in members:
                to[old] = new
        return to

    def sorted(self) -> Decision:
        """Groups in the order of their leads: routers with groups of experts need it, people like
        it.
        """
        order = sorted(range(len(self.groups)), key=lambda j: self.groups[j][0])
        return replace(
            self,
            groups=tuple(self.groups[j] for j in order),
            weights=tuple(self.weights[j] for j in order) if self.weights else (),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data; `keep` where nothing is merged."""
        merged = any(len(g) > 1 for g in self.groups)
        data: dict[str, Any] = (
            {
                "groups": [list(g) for g in self.groups],
                "weights": [list(self.weight(j)) for j in range(self.count)],
            }
            if merged
            else {"keep": self.leads}
        )
        extra = {
            "scores": [float(f"{s:.8g}") for s in self.scores],
            "protected": list(self.protected),
            "constant": list(self.constant),
            "sparsity": self.sparsity,
            "orders": {str(e): list(o) for e, o in self.orders.items()},
        }
        return data | {k: v for k, v in extra.items() if v}

    @classmethod
    def from_json(cls, data: Any, experts: int, at: Where) -> Decision:
        """Read what `as_json` wrote or a person edited; UsageError naming the layer for anything
        that does not hold together.
        """
        _check_keys(data, at)
        made = _parsed(data, at)
        _check_experts(made, experts, at)
        _check_weights(made, at)
        if any(sorted(order) != list(range(len(order))) for order in made.orders.values()):
            raise at.wrong(
                "a neuron order is no permutation", hint="leave `orders` as they were written"
            )
        return made.sorted()


@dataclass(frozen=True)
class Where:
    """Where a decision stands, for messages."""

    file: str
    layer: str

    def wrong(self, message: str, **more: Any) -> UsageError:
        return UsageError(message, file=self.file, tensor=f"layer {self.layer}", **more)


def _check_keys(data: Any, at: Where) -> None:
    if isinstance(data, dict) and not set(data) - _KEYS and {"keep", "groups"} & set(data):
        return
    wrong = sorted(set(data) - _KEYS) if isinstance(data, dict) else [str(data)[:40]]
    raise at.wrong(
        "a layer's decision is malformed",
        expected="keep or groups",
        found=", ".join(wrong) or "neither",
        hint=did_you_mean(wrong[0], _KEYS) if wrong else "name the experts to keep",
    )


def _parsed(data: dict[str, Any], at: Where) -> Decision:
    try:
        groups = [[e] for e in data["keep"]] if "keep" in data else data["groups"]
        return Decision(
            groups=tuple(tuple(map(int, g)) for g in groups),
            weights=tuple(tuple(map(float, row)) for row in data.get("weights", ())),
            scores=tuple(map(float, data.get("scores", ()))),
            protected=tuple(map(int, data.get("protected", ()))),
            constant=tuple(map(int, data.get("constant", ()))),
            sparsity=float(data.get("sparsity", 0.0)),
            orders={int(e): tuple(map(int, o)) for e, o in data.get("orders", {}).items()},
        )
    except (TypeError, ValueError, AttributeError) as problem:
        raise at.wrong(
            f"a layer's decision is malformed: {problem}",
            hint="experts are whole numbers, weights numbers",
        ) from None


def _check_experts(made: Decision, experts: int, at: Where) -> None:
    used = [e for g in made.groups for e in g]
    fits = bool(used) and min(used) >= 0 and max(used) < experts
    if not fits or len(set(used)) < len(used) or not all(made.groups):
        raise at.wrong(
            "a layer's experts do not fit",
            expected=f"each of 0 to {experts - 1} at most once, and at least one",
            found=str(used)[:80],
            hint="correct the list",
        )


def _check_weights(made: Decision, at: Where) -> None:
    if made.weights and [len(w) for w in made.weights] != [len(g) for g in made.groups]:
        raise at.wrong(
            "weights and groups of a layer do not match",
            expected=[len(g) for g in made.groups][:8],
            found=[len(w) for w in made.weights][:8],
            hint="one weight for each expert of a group",
        )
    sums = [sum(row) for row in made.weights]
    bad = [s for s in sums if not abs(s - 1.0) < 1e-6]
    if bad:
        raise at.wrong(
            "the weights of a group do not sum to 1",
            found=bad[0],
            expected=1,
            hint="correct them, or leave `weights` out for a plain mean",
        )
