"""What upcycle is told, with the words of its grammar: FORM x KEY x LAW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from moetool.methods.field import WHAT
from moetool.methods.options import Storing, same
from moetool.methods.options import fields as fields_of
from moetool.methods.several import Split
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.methods.upcycle.laws.law import RouteLaw
from moetool.methods.upcycle.options import AUTO, Upcycling
from moetool.methods.upcycle.word import words
from moetool.surgery.reform import FORMS
from moetool.surgery.route import ROUTED


def _forms() -> str:
    """What --form may say: a kind of experts, or how a source's quantized matrices are stored."""
    kinds = "; ".join(f"{name}: {kind.line()}" for name, kind in ExpertKind.known().items())
    stored = next(f.help for f in fields_of(Storing) if f.name == "form")
    return f"what experts are, where no stock class has such: {kinds}; else {stored}"


def _top_k() -> str:
    """What --top-k is where nothing is said."""
    usual, known = ExpertKind.top_k, {"form": ExpertKind.known(), "key": words(RouteKey)}
    others = [*chain.from_iterable(_one(axis, found, usual) for axis, found in known.items())]
    all_run = [f"--law {n}" for n, law in words(RouteLaw).items() if law.all_run]
    return (
        f"experts that run for a token; 0: {usual}; 1 with {' or '.join(others)}; all with "
        f"{' or '.join(all_run)}"
    )


def _one(axis: str, found: Mapping[str, type[Any]], usual: int) -> list[str]:
    """Words with which one expert is usual."""
    return [f"--{axis} {name}" for name, word in found.items() if word.top_k not in (0, usual)]


@dataclass(frozen=True)
class Growing(Upcycling):
    """What upcycle is told."""

    form: str = same(
        Storing,
        "form",
        help=_forms,
        panel=WHAT,
        choices=lambda: tuple(dict.fromkeys((*FORMS, *ExpertKind.known()))),
    )
    top_k: int = same(Upcycling, "top_k", help=_top_k)


def axes() -> Mapping[str, Mapping[str, type[Any]]]:
    """Options that name words of the grammar -> these."""
    return {"form": ExpertKind.known(), "key": words(RouteKey), "law": words(RouteLaw)}


def kind(options: Upcycling) -> type[ExpertKind]:
    """The kind of experts that is meant; `ExpertKind` itself where a stock class holds them."""
    return next((kind for kind in ExpertKind.known().values() if kind.meant(options)), ExpertKind)


def route(options: Upcycling) -> Mapping[str, type[Any]]:
    """The key and the law that are meant."""
    form = kind(options)
    key = words(RouteKey)[form.looks or options.key if options.key == ROUTED else options.key]
    usual = key.law(form.law, form.standing(options))
    return {"key": key, "law": words(RouteLaw)[usual if options.law == AUTO else options.law]}


def way(told: Split) -> ExpertKind:
    """The kind of experts with its route, and --top-k as is usual where nothing is said."""
    (key, own_key), (law, own_law) = told.words["key"], told.words["law"]
    options: Growing = told.options
    if not options.top_k:
        usual = key.most(told.acting.top_k, options.experts)
        options = replace(options, top_k=law.most(usual, options.experts))
    made: ExpertKind = told.acting(options, told.own, key(own_key), law(own_law))
    return made
