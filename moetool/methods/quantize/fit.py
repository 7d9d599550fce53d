"""Which format for which role, so that the output is no larger than asked and loses the least
(--target-size), or loses no more than asked and is the smallest (--max-kl alone).

Each role is measured in each format by itself (sensitivity.py). What a plan loses is taken to be
the sum over its roles, every combination that the loader takes is ranked by it, and the best are
measured as a whole, the best one of a single format among them: so the choice is never worse than
that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice, product
from math import prod
from typing import TYPE_CHECKING

from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Settings
from moetool.methods.quantize import scheme as schemes
from moetool.methods.quantize.choice import Choice
from moetool.methods.quantize.options import Quantizing
from moetool.methods.quantize.refuse import FULL
from moetool.methods.quantize.scheme import EVERY_LINEAR, Scheme
from moetool.surgery import clients, forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.forms import Spelled
from moetool.surgery.plan import Plan
from moetool.surgery.roles import Matrix, Roles
from moetool.surgery.spec import size_of
from moetool.surgery.writer import as_json
from moetool.units import show_bytes

if TYPE_CHECKING:
    from moetool.methods.quantize.parts.sensitivity import Meter

# Word, and groups in the order in which they are tried; of words that stand twice both are tried.
LADDER = (
    ("int2", (64, 32, 16, 0)),
    ("int2", (32, 16)),
    ("int3", (128, 64, 32, 0)),
    ("int3", (32, 16)),
    ("int4", (128, 64, 32, 0)),
    ("int4", (32, 16)),
    ("int6", (128, 64, 32, 0)),
    ("int8", (128, 64, 32, 0)),
)
GGUF = ("gguf:q4_0", "gguf:q5_0", "gguf:q8_0")
MEASURED = 3  # plans that are measured as a whole, beside the best of a single format
SHOWN = 8  # plans that the report names


@dataclass(frozen=True)
class Rated:
    """A role in a format: stored bytes, and what it costs to round it so (`Meter.unit`)."""

    role: str
    asked: Spelled | None  # None: it stays full
    size: int
    loss: float = 0.0

    @property
    def word(self) -> str:
        return str(self.asked) if self.asked else FULL

    @property
    def scheme(self) -> Scheme:
        return Scheme({self.role: self.asked} if self.asked else {})


@dataclass(frozen=True)
class Considered:
    """A whole plan: predicted loss, estimated bytes of its files; what was measured of it."""

    parts: tuple[Rated, ...]
    predicted: float
    size: int
    exact: int = 0
    measured: float | None = None

    @property
    def plan(self) -> str:
        """As --plan takes it."""
        return ",".join(f"{part.role}={part.word}" for part in self.parts)

    @property
    def single(self) -> bool:
        """Whether all linears have one format."""
        return len({part.word for part in self.parts if part.role in EVERY_LINEAR}) == 1

    @property
    def scheme(self) -> Scheme:
        return Scheme({part.role: part.asked for part in self.parts if part.asked})

    def as_json(self) -> JsonObject:
        found = {"plan": self.plan, "bytes": self.exact or self.size, "predicted": self.predicted}
        return found | ({} if self.measured is None else {"measured": self.measured})


@dataclass(frozen=True)
class BestPlan:
    """What was chosen, and the tables behind it."""

    plan: str
    report: JsonObject = field(default_factory=dict)
    memory: int = 0


@dataclass(frozen=True)
class ToFit:
    """A model, what was asked, and how a scheme becomes a plan of its files."""

    source: Checkpoint
    verb: Quantizing
    settings: Settings
    plan_of: Callable[[Scheme], Plan]
    held: dict[tuple[str, str], bool] = field(default_factory=dict)  # role, format: is it taken

    @cached_property
    def roles(self) -> dict[str, list[Matrix]]:
        """The matrices of each role that can be rounded, in the order of `EVERY_LINEAR`."""
        found: dict[str, list[Matrix]] = {}
        for matrix in Roles.of(self.source).matrices:
            found.setdefault(matrix.role, []).append(matrix)
        tables = ("embed", "lm_head") if "llama.cpp" in self.loaders else ()
        return {role: found[role] for role in (*EVERY_LINEAR, *tables) if role in found}

    @property
    def loaders(self) -> tuple[str, ...]:
        return self.verb.named or ("transformers5",)

    @property
    def said(self) -> str:
        """Who must read it, in words."""
        return " and ".join(self.loaders)

    def size(self, scheme: Scheme) -> int:
        """Bytes of all that a loader needs: weights with their headers, index, config, and what
        travels with them.
        """
        plan = self.plan_of(scheme)
        beside = [*plan.beside().values(), plan.config]
        travelling = (os.path.join(self.source.folder, n) for n in self.source.travelling())
        small = sum(len(as_json(data)) for data in beside)
        return plan.disk + small + sum(os.path.getsize(path) for path in travelling)


def fit(job: ToFit) -> BestPlan:
    """Choose. Raises MoetoolError where nothing fits, or the source already does."""
    from moetool.methods.quantize.parts import sensitivity

    candidates = {role: list(_candidates(job, role)) for role in job.roles}
    empty = next((role for role, found in candidates.items() if not found), None)
    if not candidates or empty:
        raise MoetoolError(
            f"no format that {job.said} reads holds the matrices of {empty or 'this model'}",
            file=job.source.folder,
            hint="choose another loader (--for), or give a --plan",
        )
    _check(job, candidates)
    meter = sensitivity.meter(job.source, job.verb, job.settings)
    rated = _rated(job, candidates, meter)
    ranked = _ranked(job, rated)
    tried = _measured(job, ranked, meter)
    best = min(tried, key=lambda p: (p.predicted if p.measured is None else p.measured, p.exact))
    seen, most = {plan.plan for plan in tried}, job.verb.target_size or best.size * 2
    others = [p for p in ranked if p.plan not in seen and p.size <= most][:SHOWN]
    report = {
        "plan": best.plan,
        "bytes": best.exact,
        "target": job.verb.target_size,
        "unit": meter.unit,
        "tokens": meter.tokens,
        "sensitivity": _table(rated),
        "considered": [plan.as_json() for plan in (*tried, *others)],
    }
    return BestPlan(best.plan, report, meter.peak)


def _rated(
    job: ToFit, candidates: Mapping[str, Sequence[Rated]], meter: Meter
) -> dict[str, list[Rated]]:
    """Every role in every format, by itself."""
    from moetool.methods.quantize.parts import sensitivity

    rated: dict[str, list[Rated]] = {}
    total = sum(map(len, candidates.values()))
    for number, one in enumerate(chain.from_iterable(candidates.values())):
        sensitivity.told(job.settings.tell, number, total)
        choice = _chosen(job, one.scheme)
        assert choice is not None
        loss = meter(f"{one.role}={one.word}", choice)
        rated.setdefault(one.role, []).append(replace(one, loss=loss))
    sensitivity.told(job.settings.tell, total, total)
    return rated


def _candidates(job: ToFit, role: str) -> Iterator[Rated]:
    """The formats that all matrices of a role and the loader take, the smallest first: of those
    that stand in for each other the first that every role takes, so that there are plans of a
    single format; else the role's own first.
    """
    known: set[str] = set()
    for texts in _ladder(job.loaders, role):
        able = [a for a in map(forms.asked, texts) if _held(job, role, a)]
        others = [r for r in job.roles if r != role and r in EVERY_LINEAR]
        shared = (a for a in able if all(_held(job, other, a) for other in others))
        asked = next(shared, able[0] if able else None)
        if asked and str(asked) not in known:
            known.add(str(asked))
            yield Rated(role, asked, _stored(job, role, asked))


def _ladder(loaders: Sequence[str], role: str) -> list[list[str]]:
    """Formats to try, each with those that stand in for it."""
    if "llama.cpp" not in loaders:
        return [[f"{word}/{group or 'channel'}" for group in groups] for word, groups in LADDER]
    return [[word] for word in (GGUF if role in EVERY_LINEAR else GGUF[-1:])]


def _held(job: ToFit, role: str, asked: Spelled) -> bool:
    """Whether every matrix of a role can be stored so, and the loader reads it."""
    if (role, str(asked)) not in job.held:
        job.held[role, str(asked)] = _takes(job, role, asked)
    return job.held[role, str(asked)]


def _takes(job: ToFit, role: str, asked: Spelled) -> bool:
    choice = _chosen(job, Scheme({role: asked}))
    if choice is None or len(choice.formats) < len(job.roles[role]):
        return False
    kinds = {(a.form, json.dumps(a.params, sort_keys=True)): a for a in choice.formats.values()}
    moe = role == "experts"
    return job.verb.force or all(
        clients.verdict(loader, a.form, a.params, moe=moe).works
        for loader, a in product(job.loaders, kinds.values())
    )


def _chosen(job: ToFit, scheme: Scheme) -> Choice | None:
    """None where a matrix cannot take its format; whoever reads it."""
    return _tried(job, scheme, replace(job.verb, force=True))


def _tried(job: ToFit, scheme: Scheme, verb: Quantizing) -> Choice | None:
    try:
        return schemes.choose(job.source, scheme, verb)
    except MoetoolError:
        return None


def _stored(job: ToFit, role: str, asked: Spelled) -> int:
    """Bytes of a role's matrices."""
    choice = _chosen(job, Scheme({role: asked}))
    assert choice is not None
    each = ((forms.named(a.form), a, choice.matrices[n]) for n, a in choice.formats.items())
    return round(sum(f.bits(m.shape, a.params) * prod(m.shape) / 8 for f, a, m in each))


def _check(job: ToFit, candidates: Mapping[str, Sequence[Rated]]) -> None:
    """Refuse a target that the source already meets, or that nothing reaches; before any text."""
    target = job.verb.target_size
    if not target:
        return
    have = sum(size for size, _ in job.source.files.values())
    if have <= target:
        raise UsageError(
            f"the source already is as small as that: {show_bytes(have)}",
            file=job.source.folder,
            expected=f"--target-size below {show_bytes(have)}",
            found=show_bytes(target),
            hint="give --format to quantize it all the same",
        )
    smallest = {role: min(found, key=lambda one: one.size) for role, found in candidates.items()}
    scheme = Scheme({role: one.asked for role, one in smallest.items() if one.asked})
    least = job.size(scheme)
    if least > target:
        raise MoetoolError(
            f"nothing that {job.said} reads is as small as that",
            file=job.source.folder,
            expected=f"--target-size of at least {least} ({show_bytes(least)}: {scheme})",
            found=show_bytes(target),
            hint="prune first (a recipe can do both in one go: moetool run prune-then-quantize)",
        )


def _ranked(job: ToFit, rated: Mapping[str, Sequence[Rated]]) -> list[Considered]:
    """Every combination that may fit, the best first."""
    first = Scheme({role: found[0].asked for role, found in rated.items() if found[0].asked})
    base = job.size(first) - sum(found[0].size for found in rated.values())
    each = [[*found, *_full(job, role)] for role, found in rated.items()]
    target, limit = job.verb.target_size, job.verb.max_kl
    plans = []
    for parts in product(*each):
        loss, size = sum(p.loss for p in parts), base + sum(p.size for p in parts)
        if any(p.asked for p in parts) and (size <= 1.02 * target if target else loss <= limit):
            plans.append(Considered(parts, loss, size))
    if not plans:
        best = sum(min(p.loss for p in found) for found in rated.values())
        raise MoetoolError(
            "no plan is as near to the source as that",
            file=job.source.folder,
            expected=f"a KL divergence of at most {limit:.3g}",
            found=f"{best:.3g} at best, on {job.verb.fit_tokens:,} tokens",
            hint="raise --max-kl",
        )
    return sorted(plans, key=lambda p: (p.predicted, p.size) if target else (p.size, p.predicted))


def _full(job: ToFit, role: str) -> list[Rated]:
    """What a role costs that stays as it is; experts never do."""
    if role == "experts":
        return []
    size = sum(size_of(m.dtype, m.shape) for m in job.roles[role])
    return [Rated(role, None, size)]


def _measured(job: ToFit, ranked: Sequence[Considered], meter: Meter) -> list[Considered]:
    """The first that really fit, measured as a whole: by size until one is near enough, or those of
    the least loss and the best of a single format.
    """
    real = (made for plan in ranked if (made := _exact(job, plan)))
    tried: dict[str, Considered] = {}
    if job.verb.target_size:
        alone = (made for plan in ranked if plan.single and (made := _exact(job, plan)))
        for plan in chain(islice(real, MEASURED), islice(alone, 1)):
            tried[plan.plan] = tried.get(plan.plan) or _with(job, plan, meter)
    else:
        for plan in islice(real, SHOWN):
            tried[plan.plan] = made = _with(job, plan, meter)
            if (made.measured or 0.0) <= job.verb.max_kl:
                return [made]
    if not tried or not job.verb.target_size:
        raise MoetoolError(
            f"no plan that {job.said} reads fits",
            file=job.source.folder,
            found=", ".join(f"{p.plan}: {p.measured:.3g}" for p in tried.values()) or "none",
            hint="raise --target-size or --max-kl, or choose another loader (--for)",
        )
    return list(tried.values())


def _exact(job: ToFit, plan: Considered) -> Considered | None:
    """With its size to the byte; None where it is too large, or the loader does not take it."""
    if _tried(job, plan.scheme, job.verb) is None:
        return None
    size = job.size(plan.scheme)
    if job.verb.target_size and size > job.verb.target_size:
        return None
    return replace(plan, exact=size)


def _with(job: ToFit, plan: Considered, meter: Meter) -> Considered:
    choice = _chosen(job, plan.scheme)
    assert choice is not None
    return replace(plan, measured=meter(plan.plan, choice))


def _table(rated: Mapping[str, Sequence[Rated]]) -> list[JsonObject]:
    """What each role costs in each format."""
    every = chain.from_iterable(rated.values())
    return [{"role": r.role, "format": r.word, "bytes": r.size, "loss": r.loss} for r in every]
