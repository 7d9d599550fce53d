"""`moetool verify`: is an output what its plan said?"""

from __future__ import annotations

from moetool.cli.app import session
from moetool.cli.options import Argument, Command, Given
from moetool.data import JsonObject
from moetool.methods.field import WHAT, Field
from moetool.methods.options import Checking, build, fields
from moetool.units import show_bytes

AGAINST = Field(
    "against",
    tuple,
    (),
    "what it was made from; repeat it for each --from",
    WHAT,
    unit="whole",
    metavar="SRC",
)


def run(given: Given) -> int:
    """Check, and say what was compared."""
    from moetool.evaluate.verify import verify

    against = given.values.pop("against", ())
    assert isinstance(against, tuple)
    how = build(Checking, given.values, "verify")
    out = given.arguments["out"]
    result = verify(out, against=against, how=how, tell=session.sink.progress)
    session.sink.result(result, "\n".join(_lines(result)))
    return 0


COMMAND = Command(
    "verify",
    "Check an output: is it what its plan said?\n\nWith --against also: does it still compute what "
    "its source did?",
    run,
    (Argument("out", "a folder that moetool wrote", "OUT"),),
    (AGAINST, *fields(Checking)),
    (
        "moetool verify my-moe",
        "moetool verify my-moe --against demo",
        "moetool verify my-moe --against BASE --against CODE --no-load",
    ),
    "Measure",
)


def _lines(result: JsonObject) -> list[str]:
    """The result for people."""
    certificate, structure = result["certificate"], result["structure"]
    lines = [
        f"{result['path']}: verified ({result['verified']})",
        f"  certificate  {certificate['level']}: {certificate['why']}",
        f"  structure    {structure['shards']} files carry the plan's digest, {structure['tensors']} tensors, {structure['names_checked']} names and shapes as the family wants",
    ]
    for number, step in enumerate(result.get("steps", ()), 1):
        counts = f"{step['tensors_used']} tensors used, {step['tensors_dropped']} dropped by name"
        lines.append(f"  step {number}       {step['method']}, planned again: {counts}")
    if result.get("bytes"):
        lines += _bytes(result["bytes"], result["accounted"])
    if result.get("forms"):
        stored = ", ".join(f"{count} matrices as {name}" for name, count in result["forms"].items())
        lines.append(f"  stored       {stored}")
    if result.get("proof"):
        lines.append(_rounded(result["proof"]))
    if result.get("loaded"):
        from moetool.methods.proof import Loaded

        lines.append(f"  loader       {Loaded.from_json(result['loaded'])}")
    if result.get("blocks"):
        worst = max(result["blocks"], key=lambda b: b["relative"])
        lines.append(
            f"  blocks       {len(result['blocks'])} MoE blocks against their FFNs in float32: largest relative error {worst['relative']:.2g} (layer {worst['layer']})"
        )
    if result.get("logits"):
        found = result["logits"]
        same = "the same" if found["same_greedy"] else "differ"
        greedy = f"; {found['greedy_tokens']} greedy tokens {same}"
        lines.append(
            f"  logits       stock transformers, nothing missing: relative difference {found['relative']:.2g}{greedy * bool(found['greedy_tokens'])}"
        )
    elif result.get("logits_skipped"):
        lines.append(f"  logits       not compared: {result['logits_skipped']}")
    return lines


def _bytes(found: JsonObject, accounted: dict[str, int]) -> list[str]:
    return [
        f"  bytes        {found['copied_ranges']} copied ranges equal their sources, {found['computed_tensors']} tensors made again and equal ({show_bytes(found['bytes_compared'])})",
        f"  accounted    {accounted['tensors_used']} source tensors used, {accounted['tensors_dropped']} dropped by name; {accounted['fields_dropped']} config fields dropped by name",
    ]


def _rounded(proof: JsonObject) -> str:
    roles = ", ".join(f"{n} {r['relative_error']:.2%}" for n, r in proof["roles"].items())
    worst = f"worst {proof['worst']['tensor']} ({proof['worst']['relative_error']:.2%})"
    return f"  read back    relative error {roles}; {worst}"
