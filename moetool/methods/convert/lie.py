"""How experts should lie, single or stacked: as the clients of --for read them, or most do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moetool.methods.contract import Method
from moetool.methods.options import Served
from moetool.methods.prepared import Step
from moetool.surgery import clients, spellings
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.clients import Traits
from moetool.surgery.text_model import text_model

LAYOUTS = ("per-expert", "fused")
_BROKEN = ("wrong", "refuses")


def chosen(source: Checkpoint, serves: Sequence[str]) -> str:
    """The layout that works in all of `serves`, then in most clients; single experts where both do
    alike. Which of the named ones it does not work in is for `works.check` to say.
    """
    found = _traits(source)
    able = _able(source) or LAYOUTS[:1]
    return max(
        able, key=lambda lie: _worth(replace(found, facts={**found.facts, "layout": lie}), serves)
    )


def other(options: object, source: Checkpoint) -> str:
    """The layout to write experts in that lie in a way that a client of --for does not read; empty
    where they may lie as they do, or nothing helps.
    """
    if not isinstance(options, Served) or not options.serves:
        return ""
    found, serves = _traits(source), options.serves
    if found.facts.get("layout") not in LAYOUTS or not _broken(found, serves):
        return ""
    would = chosen(source, serves)
    return "" if _broken(_lying(found, would), serves) else would


def first(method: Method, source: Checkpoint) -> Step | None:
    """The step before a verb that keeps experts as they lie, where they must lie otherwise."""
    to = "" if method.lays else other(method.options, source)
    return Step("convert-layout", {"to": to}) if to else None


def _lying(found: Traits, layout: str) -> Traits:
    return replace(found, facts={**found.facts, "layout": layout})


def _traits(source: Checkpoint) -> Traits:
    config = spellings.completed(source.config)  # as it will be written
    return clients.traits(config, source.tensors, folder=source.folder)


def _able(source: Checkpoint) -> list[str]:
    """The layouts that the family has."""
    layout = text_model(source.config).layout
    single = bool(layout.per_expert()) and layout.experts.reads_per_expert
    return [lie for lie, has in zip(LAYOUTS, (single, bool(layout.fused())), strict=True) if has]


def _broken(found: Traits, serves: Sequence[str]) -> list[str]:
    return [name for name in serves if clients.model(name, found).state in _BROKEN]


def _worth(found: Traits, serves: Sequence[str]) -> tuple[int, int]:
    """In how many of those named it is not broken, and in how many of all it works."""
    works = sum(clients.model(name, found).state == "works" for name in clients.clients())
    return -len(_broken(found, serves)), works
