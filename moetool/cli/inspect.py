"""`moetool inspect`: what a checkpoint is."""

from __future__ import annotations

from itertools import groupby

from moetool.cli.app import session
from moetool.cli.options import Argument, Command, Given
from moetool.data import JsonObject
from moetool.units import show_bytes, show_count


def run(given: Given) -> int:
    """Headers and config, nothing else."""
    from moetool.report.anatomy import anatomy
    from moetool.surgery import source
    from moetool.surgery.checkpoint import Checkpoint

    found = anatomy(Checkpoint.open(source.locate(given.arguments["path"])))
    session.sink.result(found, "\n".join(_lines(found)))
    rows = _rows(found["layers"])
    if rows:
        head = ["layers", "ffn", "experts", "shared", "router", "parameters each"]
        session.sink.table(head, rows)
    return 0


COMMAND = Command(
    "inspect",
    "Say what a checkpoint is, from headers and config alone.",
    run,
    (Argument("path", "a folder, a .safetensors file, or a Hub id", "PATH"),),
    examples=(
        "moetool inspect demo",
        "moetool inspect my-moe --json",
        "moetool inspect org/name@main",
    ),
    panel="Look",
)


def _lines(found: JsonObject) -> list[str]:
    known = "" if found["known"] else " (moetool has no layout for it)"
    counts = f"{show_count(found['parameters'])} parameters"
    if found["active_parameters"] != found["parameters"]:
        counts += f", {show_count(found['active_parameters'])} active"
    files = f"{found['shards']} file{'s' * (found['shards'] != 1)}, {found['tensors']} tensors"
    dtypes = ", ".join(f"{k} x{v}" for k, v in found["dtypes"].items())
    lines = [
        f"{found['path']}: {found['family']}{known}, {found['kind']}, {counts}",
        f"{show_bytes(found['bytes'])} in {files}, {dtypes}",
    ]
    if found["hub_class"]:
        lines.append(f"stored: by the names of {found['hub_class']} (code of the Hub)")
    if found["forms"]:
        stored = ", ".join(f"{count} matrices as {form}" for form, count in found["forms"].items())
        lines.append(f"stored: {stored}")
    for group in found["groups"]:
        tower = "" if group["tower"] == "text" else f" of the {group['tower']} tower"
        lines.append(
            f"group {group['name']} at the {group['site']}{tower}: {group['experts']}; "
            f"{group['route']}; "
            f"layers {', '.join(map(str, group['layers']))}"
        )
        lines += [f"  {group['note']}"] if group["note"] else []
    if found["tied"]:
        lines.append(f"tied: {', '.join(found['tied'])}")
    if found["law"] and found["kind"] == "moe":
        law = found["law"]
        lines.append(
            f"routing: {law['score']}, top-{found['top_k']}, renormalised: {law['renorm']}"
        )
    unknown = found["unknown_tensors"]
    if unknown:
        lines.append(f"not known to the family: {len(unknown)}, first {unknown[0]}")
    return [*lines, *(f"contradiction: {said}" for said in found["contradictions"])]


def _rows(layers: list[JsonObject]) -> list[list[object]]:
    """Layers that are alike, in one row."""
    same = groupby(layers, key=lambda r: {k: v for k, v in r.items() if k != "layer"})
    return [_row(list(group)) for _, group in same]


def _row(alike: list[JsonObject]) -> list[object]:
    first, last = alike[0], alike[-1]["layer"]
    span = f"{first['layer']}-{last}" if len(alike) > 1 else str(first["layer"])
    stacked = " stacked" if first["stacked"] else ""
    wide = f" x {first['expert_width']}" if first["expert_width"] else ""
    experts = f"{first['experts']}{wide}{stacked}" if first["experts"] else "-"
    router = (first["router"] or "-") + (" + bias" if first["router_bias"] else "")
    return [
        f"{first.get('tower', '')} {span}".strip(),
        first["ffn"] or "-",
        experts,
        first["shared"] or "-",
        router,
        show_count(first["parameters"]),
    ]
