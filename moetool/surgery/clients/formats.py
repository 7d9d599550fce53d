"""What a client says of forms. A cell is (client, form, params, experts or not). Rules hold for
what is written together: one format for all experts, a width that a block must divide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moetool.data import JsonObject
from moetool.surgery.clients.cells import KNOWN, STATES, Cell

EXPERTS, FULL = "experts", "full"
_STACK = 3  # axes of experts in one tensor, which a loader of single matrices does not look for
_LISTS = ("forms", "roles", "dtypes")
_DTYPES = {"F16": "float16", "F32": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Assigned:
    """A matrix of an output: what it is for and how it will be stored. `said`: the format as the
    user spelled it; `bias`: whether its linear adds one.
    """

    role: str
    form: str
    params: JsonObject = field(default_factory=dict)
    said: str = ""
    name: str = ""
    shape: tuple[int, ...] = ()
    layer: int | None = None
    bias: bool = False
    dtype: str = ""  # that the model computes in

    @property
    def what(self) -> str:
        """`int4/128 experts`."""
        return f"{self.said or self.form} {self.role}"


@dataclass(frozen=True)
class Case:
    """Cells for the params that `when` names (param -> values; absent ones are None)."""

    dense: Cell
    experts: Cell
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, data: JsonObject) -> Case:
        """`both` stands for dense and experts; TypeError for an unknown key."""
        rest = dict(data)
        both = rest.pop("both", None)
        dense, experts = (Cell(**rest.pop(k, None) or both) for k in ("dense", EXPERTS))
        return cls(dense, experts, **rest)

    def meets(self, params: JsonObject) -> bool:
        """Whether the params are those it speaks of."""
        return all(params.get(key) in values for key, values in self.when.items())


@dataclass(frozen=True)
class Demand:
    """What must hold of a whole output. `kind`: alike (experts share form and params, within a
    model or a layer), whole (no single expert stays full beside `forms`), never (a role of `roles`
    in these forms), divided (params[`by`] divides both widths), unbiased (no linear adds a bias),
    computed (the model computes in one of `dtypes`, where a role of `roles` is in these forms).
    """

    kind: str
    state: str
    forms: tuple[str, ...]
    why: str
    known: str
    within: str = "model"
    roles: tuple[str, ...] = ()
    by: str = ""
    dtypes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _RULES or self.state not in STATES[1:] or self.known not in KNOWN:
            raise TypeError(f"{self.kind}, {self.state}: a rule is one of {', '.join(_RULES)}")
        if not self.why:
            raise TypeError(f"rule {self.kind} without a reason")

    @classmethod
    def read(cls, data: JsonObject) -> Demand:
        """TypeError for an unknown key."""
        lists: JsonObject = {k: tuple(data[k]) for k in _LISTS if k in data}
        return cls(**(data | lists))

    def refusal(self, asked: Sequence[Assigned]) -> str:
        """What breaks it, in words; empty where nothing does."""
        return _RULES[self.kind](self, [a for a in asked if a.form in (*self.forms, FULL)])


def _alike(rule: Demand, asked: Sequence[Assigned]) -> str:
    seen: dict[int | None, Assigned] = {}
    for one in (a for a in asked if a.role == EXPERTS and a.form != FULL):
        first = seen.setdefault(one.layer if rule.within == "layer" else None, one)
        if (first.form, first.params) != (one.form, one.params):
            where = f" of layer {one.layer}" if rule.within == "layer" else ""
            return f"experts{where} in two formats ({first.what}; {one.what} {one.name})".rstrip()
    return ""


def _whole(rule: Demand, asked: Sequence[Assigned]) -> str:
    full = [a for a in asked if a.role == EXPERTS and a.form == FULL and len(a.shape) != _STACK]
    other = [a for a in asked if a.form != FULL]
    return f"experts left full beside {other[0].what} ({full[0].name})" if full and other else ""


def _never(rule: Demand, asked: Sequence[Assigned]) -> str:
    return next((a.what for a in asked if a.role in rule.roles and a.form != FULL), "")


def _divided(rule: Demand, asked: Sequence[Assigned]) -> str:
    for one in (a for a in asked if a.form != FULL):
        blocks = one.params.get(rule.by) or ()
        if any(n % b for n, b in zip(one.shape[-2:], blocks, strict=False)):
            return f"{one.what} {one.name} {list(one.shape)}, which {blocks} does not divide"
    return ""


def _unbiased(rule: Demand, asked: Sequence[Assigned]) -> str:
    return next((f"{a.what} with a bias" for a in asked if a.bias and a.form != FULL), "")


def _computed(rule: Demand, asked: Sequence[Assigned]) -> str:
    mine = [a for a in asked if a.role in rule.roles and a.form != FULL and a.dtype]
    other = next((a for a in mine if a.dtype not in rule.dtypes), None)
    return f"{other.what} of a model in {_DTYPES.get(other.dtype, other.dtype)}" if other else ""


_RULES = {
    "alike": _alike,
    "whole": _whole,
    "never": _never,
    "divided": _divided,
    "unbiased": _unbiased,
    "computed": _computed,
}
