"""Which loader reads which form, as data (archs/clients.json): what was run, or read in its source.

A cell is (loader, form, params, experts or not). Rules hold for what is written together: one
format for all experts, a width that a block must divide. Whoever writes asks before any work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from moetool.data import JsonObject
from moetool.errors import MoetoolError, did_you_mean
from moetool.surgery.layout import DATA

FILE = DATA / "clients.json"
STATES = ("works", "refuses", "wrong", "untried")
KNOWN = ("run", "source", "untried")
_EXPERTS, _FULL = "experts", "full"
_STACK = 3  # axes of experts in one tensor, which a loader of single matrices does not look for
_LISTS = ("forms", "roles", "dtypes")
_DTYPES = {"F16": "float16", "F32": "float32", "BF16": "bfloat16"}
_OTHER = "*"  # any form that a loader's entry does not name


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
class Verdict:
    """What a loader makes of a matrix in a form. `state`: works, refuses (loudly), wrong (silently)
    or untried; `known`: whether somebody ran it or read it in the source of `version`; `through`:
    what makes it read this all the same.
    """

    state: str
    why: str
    version: str
    known: str
    through: str = ""

    @property
    def works(self) -> bool:
        return self.state == "works"


@dataclass(frozen=True)
class Cell:
    """The same for the file: a reason is needed wherever it does not work."""

    state: str
    known: str
    why: str = ""
    version: str = ""
    through: str = ""

    def __post_init__(self) -> None:
        if self.state not in STATES or self.known not in KNOWN:
            raise TypeError(f"{self.state}, {self.known}: not of {STATES} and {KNOWN}")
        if (self.state == "works") == bool(self.why):
            raise TypeError(f"{self.state} with the reason {self.why!r}")


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
        dense, experts = (Cell(**rest.pop(k, None) or both) for k in ("dense", _EXPERTS))
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
        return _RULES[self.kind](self, [a for a in asked if a.form in (*self.forms, _FULL)])


@dataclass(frozen=True)
class Client:
    """A loader: what it reads of single matrices, and rules for all of them."""

    about: str
    version: str
    forms: Mapping[str, tuple[Case, ...]]
    rules: tuple[Demand, ...] = ()

    @classmethod
    def read(cls, data: JsonObject) -> Client:
        """TypeError for an unknown key, in nested parts too."""
        rest = dict(data)
        forms = {n: tuple(map(Case.read, cases)) for n, cases in rest.pop("forms").items()}
        return cls(forms=forms, rules=tuple(map(Demand.read, rest.pop("rules", ()))), **rest)


def _alike(rule: Demand, asked: Sequence[Assigned]) -> str:
    seen: dict[int | None, Assigned] = {}
    for one in (a for a in asked if a.role == _EXPERTS and a.form != _FULL):
        first = seen.setdefault(one.layer if rule.within == "layer" else None, one)
        if (first.form, first.params) != (one.form, one.params):
            where = f" of layer {one.layer}" if rule.within == "layer" else ""
            return f"experts{where} in two formats ({first.what}; {one.what} {one.name})".rstrip()
    return ""


def _whole(rule: Demand, asked: Sequence[Assigned]) -> str:
    full = [a for a in asked if a.role == _EXPERTS and a.form == _FULL and len(a.shape) != _STACK]
    other = [a for a in asked if a.form != _FULL]
    return f"experts left full beside {other[0].what} ({full[0].name})" if full and other else ""


def _never(rule: Demand, asked: Sequence[Assigned]) -> str:
    return next((a.what for a in asked if a.role in rule.roles and a.form != _FULL), "")


def _divided(rule: Demand, asked: Sequence[Assigned]) -> str:
    for one in (a for a in asked if a.form != _FULL):
        blocks = one.params.get(rule.by) or ()
        if any(n % b for n, b in zip(one.shape[-2:], blocks, strict=False)):
            return f"{one.what} {one.name} {list(one.shape)}, which {blocks} does not divide"
    return ""


def _unbiased(rule: Demand, asked: Sequence[Assigned]) -> str:
    return next((f"{a.what} with a bias" for a in asked if a.bias and a.form != _FULL), "")


def _computed(rule: Demand, asked: Sequence[Assigned]) -> str:
    mine = [a for a in asked if a.role in rule.roles and a.form != _FULL and a.dtype]
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


@lru_cache(maxsize=1)
def clients() -> dict[str, Client]:
    """Every loader by its name. MoetoolError for a file that is not as it should be."""
    return read(FILE)


def read(path: Path) -> dict[str, Client]:
    """The loaders of a file. MoetoolError for an unknown key, or a cell without a reason."""
    try:
        return {name: Client.read(entry) for name, entry in json.loads(path.read_text()).items()}
    except (TypeError, KeyError, AttributeError, ValueError) as problem:
        raise MoetoolError(
            f"the data of loaders is not as it should be: {problem}",
            file=path,
            hint="correct it; moetool/surgery/clients.py says what it may hold",
        ) from None


def client(loader: str) -> Client:
    """A loader by name; MoetoolError with the nearest names."""
    if loader not in clients():
        raise MoetoolError(
            f"no loader {loader!r}",
            expected=", ".join(clients()),
            hint=did_you_mean(loader, clients()),
        )
    return clients()[loader]


def verdict(loader: str, form: str, params: JsonObject, *, moe: bool) -> Verdict:
    """What a loader makes of a matrix in a form; `moe`: it is one of routed experts. MoetoolError
    for an unknown loader.
    """
    told = client(loader)
    for case in told.forms.get(form) or told.forms.get(_OTHER, ()):
        if case.meets(params):
            cell = case.experts if moe else case.dense
            version = cell.version or told.version
            return Verdict(cell.state, cell.why, version, cell.known, cell.through)
    return Verdict("untried", "nobody has tried it", told.version, "untried")


@dataclass(frozen=True)
class Refusal:
    """Why a loader would not read an output as it is meant: what it would do, a sentence, and what
    makes it read this all the same.
    """

    state: str
    said: str
    through: str = ""


def refusals(loader: str, scheme: Iterable[Assigned]) -> list[Refusal]:
    """Why a loader would not read these matrices as they are meant, each reason once; empty where
    it reads them all. MoetoolError for an unknown loader.
    """
    asked, told = list(scheme), client(loader)
    found: dict[Refusal, None] = {}
    for one in asked:
        if one.form == _FULL:
            continue
        given = verdict(loader, one.form, one.params, moe=one.role == _EXPERTS)
        if not given.works:
            said = _sentence(loader, given.state, one.what, given)
            found[Refusal(given.state, said, given.through)] = None
    for rule in told.rules:
        if problem := rule.refusal(asked):
            given = Verdict(rule.state, rule.why, told.version, rule.known)
            found[Refusal(rule.state, _sentence(loader, rule.state, problem, given))] = None
    return list(found)


_SAID = {
    "refuses": "does not read {}",
    "wrong": "reads {} wrongly",
    "untried": "may not read {}",
}
_EVIDENCE = {"run": "tried with", "source": "source of", "untried": "not tried with"}


def _sentence(loader: str, state: str, what: str, given: Verdict) -> str:
    evidence = f"{_EVIDENCE[given.known]} {given.version}"
    return f"{loader} {_SAID[state].format(what)}: {given.why} ({evidence})"
