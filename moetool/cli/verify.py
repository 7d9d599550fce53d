"""`moetool verify`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moetool.cli.main import app, session
from moetool.units import parse_bytes, show_bytes


@app.command()
def verify(
    out: Annotated[str, typer.Argument(metavar="OUT", help="a folder that moetool wrote")],
    against: Annotated[
        list[str],
        typer.Option(
            "--against", metavar="SRC", help="what it was made from; repeat it for each --from"
        ),
    ] = [],  # noqa: B006
    load: Annotated[
        bool | None,
        typer.Option(
            "--load/--no-load",
            help="load both in stock transformers and compare logits; default: if they fit --memory",
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option(help="models larger than this in float32 are not loaded")
    ] = "8GB",
    device: Annotated[str, typer.Option(help="where models run")] = "cpu",
) -> int:
    """Check an output: is it what its plan said, and with --against, does it still compute what
    its source did?
    """
    from moetool.evaluate.verify import verify as check

    result = check(
        out,
        against=against,
        load=load,
        memory=parse_bytes(memory),
        device=device,
        tell=session.sink.progress,
    )
    session.sink.result(result, describe(result))
    return 0


def describe(result: dict[str, Any]) -> str:
    """The result for people."""
    certificate, structure = result["certificate"], result["structure"]
    lines = [f"{result['path']}: verified ({result['verified']})"]
    lines.append(f"  certificate  {certificate['level']}: {certificate['why']}")
    lines.append(
        f"  structure    {structure['shards']} files carry the plan's digest, {structure['tensors']} tensors, {structure['names_checked']} names and shapes as the family wants"
    )
    if "bytes" in result:
        found = result["bytes"]
        lines.append(
            f"  bytes        {found['copied_ranges']} copied ranges equal their sources, {found['computed_tensors']} tensors made again and equal ({show_bytes(found['bytes_compared'])})"
        )
        lines.append(
            f"  accounted    {result['accounted']['tensors_used']} source tensors used, {result['accounted']['tensors_dropped']} dropped by name; {result['accounted']['fields_dropped']} config fields dropped by name"
        )
    if result.get("blocks"):
        worst = max(result["blocks"], key=lambda b: b["relative"])
        lines.append(
            f"  blocks       {len(result['blocks'])} MoE blocks against their FFNs in float32: largest relative error {worst['relative']:.2g} (layer {worst['layer']})"
        )
    if result.get("logits"):
        found = result["logits"]
        lines.append(
            f"  logits       stock transformers, nothing missing: relative difference {found['relative']:.2g}; {found['greedy_tokens']} greedy tokens {'the same' if found['same_greedy'] else 'differ'}"
        )
    elif "logits_skipped" in result:
        lines.append(f"  logits       not compared: {result['logits_skipped']}")
    return "\n".join(lines)
