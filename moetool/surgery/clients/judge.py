"""What each client makes of an output: a matrix in a form, all of them together, the model they
are, and, joined, the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from moetool.data import JsonObject
from moetool.surgery.clients.cells import Cell, Verdict
from moetool.surgery.clients.data import client, clients
from moetool.surgery.clients.formats import EXPERTS, FULL, Assigned
from moetool.surgery.clients.traits import Traits

_OTHER = "*"  # any form that a client's entry does not name
_WORST = ("refuses", "wrong", "untried", "works")
_SAID = {
    "refuses": "does not read {}",
    "wrong": "reads {} wrongly",
    "untried": "may not read {}",
}
_EVIDENCE = {"run": "tried with", "source": "source of", "untried": "not tried with"}


@dataclass(frozen=True)
class Refusal:
    """Why a client would not read an output as it is meant: what it would do, a sentence, what
    makes it read this all the same, and the reason alone.
    """

    state: str
    said: str
    through: str = ""
    why: str = ""


@dataclass(frozen=True)
class Judged:
    """What a client makes of an output: works only where it reads the model and every form in it.
    `why`: reasons, or what goes with a thing that works. `known`: how that is known;
    `through`: what makes it read this all the same.
    """

    client: str
    state: str
    why: tuple[str, ...]
    known: str
    version: str
    through: str = ""

    @property
    def works(self) -> bool:
        return self.state == "works"

    def as_json(self) -> JsonObject:
        """As the report has it, under the client's name."""
        found = asdict(self)
        for name in ("client", *([] if self.through else ["through"])):
            del found[name]
        return found | {"why": list(self.why)}


def verdict(name: str, form: str, params: JsonObject, *, moe: bool) -> Verdict:
    """What a client makes of a matrix in a form; `moe`: it is one of routed experts. MoetoolError
    for an unknown client.
    """
    told = client(name)
    for case in told.forms.get(form) or told.forms.get(_OTHER, ()):
        if case.meets(params):
            return _of(case.experts if moe else case.dense, told.version)
    return Verdict("untried", "nobody has tried it", told.version, "untried")


def _of(cell: Cell, version: str) -> Verdict:
    return Verdict(cell.state, cell.why, cell.version or version, cell.known, cell.through)


def refusals(name: str, scheme: Iterable[Assigned]) -> list[Refusal]:
    """Why a client would not read these matrices as they are meant, each reason once; empty where
    it reads them all. MoetoolError for an unknown client.
    """
    asked, told = list(scheme), client(name)
    found: dict[Refusal, None] = {}
    for one in asked:
        if one.form == FULL:
            continue
        given = verdict(name, one.form, one.params, moe=one.role == EXPERTS)
        if not given.works:
            said = _sentence(name, given.state, one.what, given)
            found[Refusal(given.state, said, given.through, given.why)] = None
    for rule in told.rules:
        if problem := rule.refusal(asked):
            given = Verdict(rule.state, rule.why, told.version, rule.known)
            said = _sentence(name, rule.state, problem, given)
            found[Refusal(rule.state, said, why=f"{problem}: {rule.why}")] = None
    return list(found)


def _sentence(name: str, state: str, what: str, given: Verdict) -> str:
    return f"{name} {_SAID[state].format(what)}: {given.why} ({evidence(given)})"


def evidence(given: Verdict | Judged) -> str:
    """`tried with vLLM 0.32.0`."""
    return f"{_EVIDENCE[given.known]} {given.version}"


def model(name: str, output: Traits) -> Judged:
    """What a client makes of a model, whatever form its matrices have. MoetoolError for an unknown
    client.
    """
    told = client(name).models
    found = [_of(cell, told.version) for cell in told.found(output)]
    state = next(s for s in _WORST if any(v.state == s for v in found))
    mine = [v for v in found if v.state == state]
    if state == "works":
        mine, why = mine[-1:], told.told(output)
    else:
        why = [v.why for v in mine]
    return Judged(name, state, tuple(dict.fromkeys(why)), mine[0].known, mine[0].version)


def judged(output: Traits, scheme: Sequence[Assigned] = ()) -> tuple[Judged, ...]:
    """What every client makes of an output; `scheme`: its matrices, where not all are full."""
    return tuple(_joined(name, output, scheme) for name in clients())


def _joined(name: str, output: Traits, scheme: Sequence[Assigned]) -> Judged:
    """The worse of both judgements; the reasons of one kind together."""
    of_model = model(name, output)
    of_forms = refusals(name, scheme) if scheme else []
    states = [of_model.state, *(r.state for r in of_forms)]
    state = next(s for s in _WORST if s in states)
    if state == "works":
        read = any(v.known == "source" for v in _verdicts(name, scheme))
        return replace(of_model, known="source") if read else of_model
    why = tuple(dict.fromkeys(r.why for r in of_forms if r.state == state))
    if of_model.state == state:
        return replace(of_model, why=(*of_model.why, *why))
    known = {v.known for v in _verdicts(name, scheme) if v.state == state} or {"run"}
    mine = of_forms if of_model.works else []
    through = mine[0].through if mine and all(r.through for r in mine) else ""
    return Judged(name, state, why, min(known), client(name).version, through)


def _verdicts(name: str, scheme: Sequence[Assigned]) -> list[Verdict]:
    """Each form of a scheme once."""
    kinds = {(a.form, repr(a.params), a.role == EXPERTS): a for a in scheme if a.form != FULL}
    return [verdict(name, a.form, a.params, moe=moe) for (_, _, moe), a in kinds.items()]
