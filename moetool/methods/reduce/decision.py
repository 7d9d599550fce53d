"""What was decided of one layer's experts: small, plain data, to be read, edited and replayed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from moetool.data import JsonObject
from moetool.errors import UsageError, did_you_mean

_KEYS = {"keep", "groups", "weights", "scores", "protected", "constant", "sparsity", "orders"}


@dataclass(frozen=True)
class Decision:
    """A layer: new expert j is made from the old experts groups[j] with weights[j] (their sum is
    1); the first of a group leads: its name order and, by default, its router row. `constant`:
    experts that stay as constants (MoNE).
    """

    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...] = ()
    scores: tuple[float, ...] = ()
    protected: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()
    sparsity: float = 0.0  # share of each kept matrix's weights that is zeroed as well (STUN)
    # a merged expert's neurons in its lead's order
    orders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

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

    def more(self) -> set[str]:
        """What it says beyond which experts stay, by the names of the file."""
        merged = any(len(group) > 1 for group in self.groups)
        said = {"constant": self.constant, "sparsity": self.sparsity, "orders": self.orders}
        return {name for name, value in said.items() if value} | ({"groups"} if merged else set())

    def map(self, experts: int) -> list[int | None]:
        """old expert -> new expert (the first, where it was copied), None where it went."""
        to: list[int | None] = [None] * experts
        for new, members in enumerate(self.groups):
            for old in members:
                to[old] = new if to[old] is None else to[old]
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

    def as_json(self) -> JsonObject:
        """Plain data; `keep` where nothing is merged. Neuron orders stand elsewhere (decided.py)."""
        merged = any(len(g) > 1 for g in self.groups)
        data: JsonObject = (
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
        _check_extras(made, experts, at)
        return made.checked(at).sorted()

    def checked(self, at: Where) -> Decision:
        """Itself, when its neuron orders are permutations."""
        if any(sorted(order) != list(range(len(order))) for order in self.orders.values()):
            raise at.wrong(
                "a neuron order is no permutation", hint="leave `orders` as they were written"
            )
        return self


@dataclass(frozen=True)
class Where:
    """Where a decision stands, for messages."""

    file: str
    layer: str

    def wrong(self, message: str, **more: Any) -> UsageError:
        return UsageError(message, file=self.file, tensor=f"layer {self.layer}", **more)


def _check_keys(data: Any, at: Where) -> None:
    known = isinstance(data, dict) and not set(data) - _KEYS
    if known and len({"keep", "groups"} & set(data)) == 1:
        return
    if known and {"keep", "groups"} <= set(data):
        raise at.wrong(
            "a layer's decision is malformed: it says both keep and groups",
            expected="keep or groups",
            found="both",
            hint="groups where experts are merged, keep where they only stay",
        )
    wrong = sorted(set(data) - _KEYS) if isinstance(data, dict) else [str(data)[:40]]
    raise at.wrong(
        "a layer's decision is malformed",
        expected="keep or groups",
        found=", ".join(wrong) or "neither",
        hint=did_you_mean(wrong[0], _KEYS) if wrong else "name the experts to keep",
    )


def _parsed(data: JsonObject, at: Where) -> Decision:
    try:
        groups = [[e] for e in _list(data["keep"])] if "keep" in data else _list(data["groups"])
        return Decision(
            groups=tuple(_experts(g) for g in groups),
            weights=tuple(_numbers(row) for row in _list(data.get("weights", []))),
            scores=_numbers(data.get("scores", [])),
            protected=_experts(data.get("protected", [])),
            constant=_experts(data.get("constant", [])),
            sparsity=_numbers([data.get("sparsity", 0.0)])[0],
            orders={_written(e): _experts(o) for e, o in data.get("orders", {}).items()},
        )
    except (TypeError, ValueError, AttributeError, OverflowError) as problem:
        raise at.wrong(
            f"a layer's decision is malformed: {problem}",
            expected="experts as whole numbers, weights as numbers",
            found=str(problem),
            hint='write 3, not 3.0, true or "3"',
        ) from None


def shown(value: Any) -> str:
    """A value as it stands in the file, shortened."""
    return json.dumps(value)[:40]


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError(f"{shown(value)} is no list")
    return value


def _experts(value: Any) -> tuple[int, ...]:
    """Whole numbers as JSON has them: no strings, fractions or truth values."""
    wrong = [v for v in _list(value) if type(v) is not int]
    if wrong:
        raise TypeError(f"{shown(wrong[0])} is no whole number")
    return tuple(value)


def _numbers(value: Any) -> tuple[float, ...]:
    wrong = [v for v in _list(value) if type(v) not in (int, float) or not math.isfinite(v)]
    if wrong:
        raise TypeError(f"{shown(wrong[0])} is no finite number")
    return tuple(map(float, value))


def _written(text: str) -> int:
    """A number as JSON has it for a key."""
    if not (text.isascii() and text.isdigit() and str(int(text)) == text):
        raise ValueError(f"{text[:40]!r} is no expert")
    return int(text)


def _check_experts(made: Decision, experts: int, at: Where) -> None:
    used = list(chain.from_iterable(made.groups))
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
    negative = [w for w in chain.from_iterable(made.weights) if w < 0]
    if negative:
        raise at.wrong(
            "a weight of a group is negative",
            expected="0 or more",
            found=negative[0],
            hint="an expert that should not count is left out of its group",
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


def _check_extras(made: Decision, experts: int, at: Where) -> None:
    """What may stand beside the experts."""
    used = set(chain.from_iterable(made.groups))
    if not 0.0 <= made.sparsity < 1.0:
        raise at.wrong(
            "the sparsity of a layer is the share of weights that become zero",
            expected="0 <= sparsity < 1",
            found=made.sparsity,
            hint="0.4 zeroes 40 % of each kept matrix",
        )
    if made.scores and len(made.scores) != experts:
        raise at.wrong(
            "a layer's scores are not one for each expert",
            expected=experts,
            found=len(made.scores),
            hint="leave `scores` as they were written, or out",
        )
    for name, named in (("protected", made.protected), ("constant", made.constant)):
        strange = sorted(set(named) - used)
        if strange or len(set(named)) < len(named):
            raise at.wrong(
                f"`{name}` names experts that do not stay, or one twice",
                expected="each at most once, of those in keep",
                found=(strange or list(named))[:8],
                hint="correct the list",
            )
    strange = sorted(set(made.orders) - used)
    if strange:
        raise at.wrong(
            "a neuron order is of an expert that is in no group",
            expected="experts of the groups",
            found=strange[0],
            hint="leave `orders` as they were written",
        )
