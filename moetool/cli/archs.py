"""`moetool archs`: the families, and what converts to what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.cli.app import session
from moetool.cli.options import Argument, Command, Given
from moetool.data import JsonObject

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moetool.surgery.clients import Judged
    from moetool.surgery.layout import Layout
    from moetool.surgery.pair import Pair

HELP = "Model families: which there are, what converts to what exactly, and why not."


def list_(given: Given) -> int:
    """Families and conversions."""
    from moetool.surgery import hub
    from moetool.surgery.layout import families
    from moetool.surgery.pair import pairs

    into: dict[str, list[str]] = {}
    for pair in pairs():
        with_text = f" with {pair.inner.partition('--')[2]} text" if pair.inner else ""
        into.setdefault(pair.source, []).append(pair.target + with_text)
    sink, kinds = session.sink, families()
    read = {one.model_types[0]: one.family for one in hub.families()}
    found = {"moe": kinds["moe"], "dense": kinds["dense"], "conversions": into, "read_as": read}
    sink.result(found)
    head = ["dense family", "exact mixture of experts"]
    sink.table(head, [[name, ", ".join(into[name])] for name in sorted(into)])
    rest, moe = [d for d in kinds["dense"] if d not in into], kinds["moe"]
    sink.line(f"\n{len(rest)} dense families without an exact target: {', '.join(rest)}")
    sink.line(f"\n{len(moe)} families with experts (inspect, convert-layout): {', '.join(moe)}")
    of_hub = ", ".join(f"{name} (a {family})" for name, family in read.items())
    sink.line(f"\nclasses of the Hub, read as one of transformers without their code: {of_hub}")
    return 0


def show(given: Given) -> int:
    """One family."""
    from moetool.methods.upcycle import usual
    from moetool.methods.upcycle.targets import why_not
    from moetool.surgery import ffn, hub
    from moetool.surgery.layout import Layout
    from moetool.surgery.pair import pairs

    family = given.arguments["family"]
    if (read := hub.family(family)) is not None:
        session.sink.line(f"{family}: {read.cls} of the Hub, read as {read.family}")
        family = read.family
    layout = Layout.load(family)
    conversions = [_conversion(p) for p in pairs() if p.source == family]
    found: JsonObject = {
        "family": family,
        "class": layout.cls,
        "kind": layout.kind,
        "law": layout.overlay.law.as_json() or None,
        "reads_per_expert": layout.experts.reads_per_expert if layout.kind == "moe" else None,
        "conversions": conversions,
        "comes_from": sorted({p.source for p in pairs() if p.target == family and not p.inner}),
        "why_not": why_not(layout) if not conversions else None,
        "clients": _clients(usual.of_family(family)),
        "but": [t._asdict() for t in usual.told(family)],
        "groups": dict(ffn.stands(layout)),
        "note": layout.overlay.note,
        "tensors": _tensors(layout),
    }
    session.sink.result(found, "\n".join(_lines(found)))
    _where(found)
    head = ["tensor", "shape", "role", "layers", "when"]
    session.sink.table(head, [_row(t) for t in found["tensors"]], plain=True)
    return 0


COMMANDS = (
    Command(
        "list",
        "Every family there is a layout for, and what dense ones convert to.",
        list_,
        examples=(
            "moetool archs list",
            "moetool archs list --json",
            "moetool archs list --json | python -m json.tool",
        ),
    ),
    Command(
        "show",
        "One family: its tensors, and what it converts to, under which conditions.",
        show,
        (Argument("family", "a model type, as in config.json", "FAMILY"),),
        examples=(
            "moetool archs show llama",
            "moetool archs show qwen3_moe",
            "moetool archs show gpt_oss --json",
        ),
    ),
)


def _tensors(layout: Layout) -> list[JsonObject]:
    return [
        {"name": s.name, "shape": s.shape, "role": s.role, "layers": s.layers, "when": s.when}
        for s in layout.tensors
    ]


def _lines(found: JsonObject) -> list[str]:
    lines = [f"{found['family']}: {found['class']}, {found['kind']}"]
    for entry in found["conversions"]:
        shown = ", ".join(filter(None, (entry["measured"], entry["evidence"])))
        lines.append(f"-> {entry['target']}: exact ({shown})")
        lines += [f"     only if {line}" for line in entry["only_if"]]
        lines += [f"     {line}" for line in entry["not_in"]]
    if found["why_not"]:
        lines.append(f"-> nothing: {found['why_not']}")
    if found["comes_from"]:
        lines.append(f"<- {', '.join(found['comes_from'])}")
    for tower, where in found["groups"].items():
        lines.append(f"groups of experts, tower {tower}: {where}")
    if found["law"]:
        law = ", ".join(f"{name} {value}" for name, value in found["law"].items())
        lines.append(f"routing: {law}")
    return lines


def _where(found: JsonObject) -> None:
    """What works in which client: targets of a dense family; itself, and what changes that."""
    usual = {entry["target"]: entry["clients"] for entry in found["conversions"]}
    if found["kind"] == "moe":
        usual[found["family"]] = found["clients"]
    head = ["usually", *found["clients"]]
    states = [[name, *(one["state"] for one in told.values())] for name, told in usual.items()]
    session.sink.table(head, states, plain=True)
    rows = [[t["client"], t["of"], t["state"], t["why"]] for t in found["but"]]
    if rows:
        session.sink.table(["client", "with", "is", "because"], rows, plain=True)


def _clients(judged: Iterable[Judged]) -> JsonObject:
    return {one.client: one.as_json() for one in judged}


def _row(tensor: JsonObject) -> list[str]:
    shape = " x ".join(size or "?" for size in tensor["shape"] or [None])
    return [tensor["name"], shape, *(tensor[k] or "" for k in ("role", "layers", "when"))]


def _conversion(pair: Pair) -> JsonObject:
    from moetool.methods import works
    from moetool.methods.upcycle import usual

    rules, judged = [], usual.of_pair(pair)
    for rule in pair.require:
        wanted = f"= {rule.values[0]!r}" if rule.values else f"is all {rule.each}"
        rules.append(f"{rule.field} {wanted} ({rule.because})")
    if not pair.rope_partial and not pair.inner:
        rules.append("partial_rotary_factor = 1, where the family has it")
    return {
        "target": f"{pair.target} ({pair.inner} inside)" if pair.inner else pair.target,
        "only_if": rules,
        "dropped_fields": pair.drop,
        "measured": pair.measured,
        "evidence": pair.evidence,
        "clients": _clients(judged),
        "not_in": [f"{o.client} {works.said(o)}" for o in judged if not o.works],
    }
