"""Where a conversion, or a family with experts, works as it usually is: what people ask before they
have a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from moetool.data import JsonObject
from moetool.surgery import clients
from moetool.surgery.clients import Judged
from moetool.surgery.family import filled
from moetool.surgery.layout import Layout
from moetool.surgery.pair import Pair, map_config
from moetool.surgery.spellings import completed

_EXPERTS, _TOP_K = 8, 2


class Told(NamedTuple):
    """What changes the usual: `mlx: wrong with llama3 rope (its Mixtral ignores rope_scaling)`."""

    client: str
    state: str
    of: str
    why: str

    def __str__(self) -> str:
        return f"{self.client}: {self.state} with {self.of} ({self.why})"


def of_pair(pair: Pair) -> tuple[Judged, ...]:
    """Of a conversion of the source family's default config, experts a tensor each."""
    if pair.inner:
        return of_family(pair.target)
    source, target = Layout.load(pair.source), Layout.load(pair.target)
    fields = target.fields
    decided: JsonObject = {fields["experts"]: _EXPERTS, fields["top_k"]: _TOP_K}
    shared = target.overlay.shared
    decided |= {shared.count: 1} if shared and shared.count else {}
    mapped = map_config(pair, source, target, {"model_type": pair.source}, decided)
    config = completed(mapped.value)
    forms = target.per_expert()
    layers = range(target.field("layers", config))
    names = [filled(forms["down"], layer=n, expert=0) for n in layers] if forms else []
    return clients.judged(clients.traits(config, names))


def of_family(family: str) -> tuple[Judged, ...]:
    """Of a family, whatever is written of it, where nothing that `told` names is so."""
    found = []
    for name, client in clients.clients().items():
        cell, version = client.models.of(family), client.models.version
        why = (cell.why,) if cell.why else ()
        found.append(Judged(name, cell.state, why, cell.known, cell.version or version))
    return tuple(found)


def told(family: str) -> Iterator[Told]:
    """What makes a client that works do something else, of outputs of a family."""
    for name, client in clients.clients().items():
        for rule in client.models.rules:
            if family in rule.families:
                why = rule.told or rule.cell.why
                yield Told(name, rule.cell.state, str(rule), why)
