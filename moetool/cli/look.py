"""Commands that only look: inspect, archs, methods."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any

import typer

from moetool.cli.main import app, archs_app, methods_app, session
from moetool.units import show_bytes, show_count


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="a folder, a .safetensors file, or a Hub id")
    ],
) -> int:
    """Say what a checkpoint is, from headers and config alone."""
    from moetool.report.anatomy import anatomy
    from moetool.surgery import source
    from moetool.surgery.checkpoint import Checkpoint

    found = anatomy(Checkpoint.open(source.locate(path)))
    session.sink.result(found)
    if session.sink.mode == "human":
        _show(found)
    return 0


def _show(found: dict[str, Any]) -> None:
    sink = session.sink
    known = "" if found["known"] else " (moetool has no layout for it)"
    active = (
        f", {show_count(found['active_parameters'])} active"
        if found["active_parameters"] != found["parameters"]
        else ""
    )
    sink.result(
        None,
        f"{found['path']}: {found['family']}{known}, {found['kind']}, {show_count(found['parameters'])} parameters{active}",
    )
    sink.result(
        None,
        f"{show_bytes(found['bytes'])} in {found['shards']} file{'s' * (found['shards'] != 1)}, {found['tensors']} tensors, {', '.join(f'{k} x{v}' for k, v in found['dtypes'].items())}",
    )
    if found["tied"]:
        sink.result(None, f"tied: {', '.join(found['tied'])}")
    if found["law"] and found["kind"] == "moe":
        sink.result(
            None,
            f"routing: {found['law']['score']}, top-{found['top_k']}, renormalised: {found['law']['renorm']}",
        )
    if found["unknown_tensors"]:
        sink.result(
            None,
            f"not known to the family: {len(found['unknown_tensors'])}, first {found['unknown_tensors'][0]}",
        )
    rows = []
    for _, group in groupby(
        found["layers"], key=lambda r: {k: v for k, v in r.items() if k != "layer"}
    ):
        same = list(group)
        first = same[0]
        span = f"{first['layer']}-{same[-1]['layer']}" if len(same) > 1 else str(first["layer"])
        experts = (
            f"{first['experts']} x {first['expert_width']}{' stacked' if first['stacked'] else ''}"
            if first["experts"]
            else "-"
        )
        rows.append(
            [
                span,
                first["ffn"] or "-",
                experts,
                first["shared"] or "-",
                (first["router"] or "-") + (" + bias" if first["router_bias"] else ""),
                show_count(first["parameters"]),
            ]
        )
    if rows:
        sink.table(["layers", "ffn", "experts", "shared", "router", "parameters each"], rows)


@archs_app.command("list")
def archs_list() -> int:
    """Every family there is a layout for, and what dense ones convert to."""
    from moetool.surgery.layout import families
    from moetool.surgery.pair import pairs

    into: dict[str, list[str]] = {}
    for pair in pairs():
        into.setdefault(pair.source, []).append(
            pair.target
            if not pair.inner
            else f"{pair.target} with {pair.inner.partition('--')[2]} text"
        )
    kinds = families()
    session.sink.result({"moe": kinds["moe"], "dense": kinds["dense"], "conversions": into})
    session.sink.table(
        ["dense family", "exact mixture of experts"],
        [[name, ", ".join(into[name])] for name in sorted(into)],
    )
    others = [d for d in kinds["dense"] if d not in into]
    if session.sink.mode == "human":
        print(f"\n{len(others)} dense families without an exact target: {', '.join(others)}")
        print(
            f"\n{len(kinds['moe'])} families with experts (inspect, convert-layout): {', '.join(kinds['moe'])}"
        )
    return 0


@archs_app.command("show")
def archs_show(
    family: Annotated[
        str, typer.Argument(metavar="FAMILY", help="a model type, as in config.json")
    ],
) -> int:
    """One family: its tensors, and what it converts to, under which conditions."""
    from moetool.methods.upcycle.targets import why_not
    from moetool.surgery.layout import Layout
    from moetool.surgery.pair import pairs

    layout = Layout.load(family)
    conversions = [_conversion(p) for p in pairs() if p.source == family]
    sources = sorted({p.source for p in pairs() if p.target == family and not p.inner})
    note = why_not(layout) if not conversions else None
    session.sink.result(
        {
            "family": family,
            "class": layout.cls,
            "kind": layout.kind,
            "law": layout.overlay.law.as_json() or None,
            "reads_per_expert": layout.experts.reads_per_expert if layout.kind == "moe" else None,
            "conversions": conversions,
            "comes_from": sources,
            "why_not": note,
            "note": layout.overlay.note,
            "tensors": [
                {
                    "name": s.name,
                    "shape": s.shape,
                    "role": s.role,
                    "layers": s.layers,
                    "when": s.when,
                }
                for s in layout.tensors
            ],
        }
    )
    if session.sink.mode == "human":
        print(f"{family}: {layout.cls}, {layout.kind}")
        for entry in conversions:
            shown = ", ".join(filter(None, (entry["measured"], entry["evidence"])))
            print(f"-> {entry['target']}: exact ({shown})")
            for line in entry["only_if"]:
                print(f"     only if {line}")
        if note:
            print(f"-> nothing: {note}")
        if sources:
            print(f"<- {', '.join(sources)}")
        if layout.overlay.law.score:
            print(f"routing: {layout.overlay.law.as_json()}")
        session.sink.table(
            ["tensor", "shape", "role", "layers", "when"],
            [
                [
                    s.name,
                    " x ".join(map(str, s.shape or ["?"])),
                    s.role or "",
                    s.layers or "",
                    s.when or "",
                ]
                for s in layout.tensors
            ],
            plain=True,
        )
    return 0


def _conversion(pair: Any) -> dict[str, Any]:
    rules = []
    for rule in pair.require:
        wanted = f"= {rule.values[0]!r}" if rule.values else f"is all {rule.each}"
        rules.append(f"{rule.field} {wanted} ({rule.because})")
    if not pair.rope_partial and not pair.inner:
        rules.append("partial_rotary_factor = 1, where the family has it")
    return {
        "target": pair.target if not pair.inner else f"{pair.target} ({pair.inner} inside)",
        "only_if": rules,
        "dropped_fields": pair.drop,
        "evidence": pair.evidence,
        "measured": pair.measured,
    }


@methods_app.command("list")
def methods_list() -> int:
    """Every method, with one line each."""
    from moetool import methods

    found = [methods.describe(name) for name in methods.METHODS]
    session.sink.result(
        {"methods": [{"name": m["name"], "about": m["about"].splitlines()[0]} for m in found]}
    )
    session.sink.table(
        ["method", "what it is for"], [[m["name"], m["about"].splitlines()[0]] for m in found]
    )
    return 0


@methods_app.command("show")
def methods_show(name: Annotated[str, typer.Argument(metavar="METHOD")]) -> int:
    """A method's purpose, source and options."""
    from moetool import methods

    found = methods.describe(name)
    session.sink.result(found, found["about"] + "\n")
    for way in found.get("methods", ()):
        session.sink.result(
            None, f"{way['name']}{'' if way['text'] else ' (needs no text)'}: {way['about']}\n"
        )
    session.sink.table(
        ["option", "type", "default", "meaning"],
        [[f"--{o['name']}", o["type"], o["default"], o["help"]] for o in found["options"]],
    )
    return 0
