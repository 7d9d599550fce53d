"""`moetool profile`: see what each expert does with text."""

from __future__ import annotations

from moetool.cli.app import session
from moetool.cli.options import Argument, Command, Given
from moetool.data import JsonObject
from moetool.measure import Profiling
from moetool.methods.options import build, fields
from moetool.units import show_bytes, show_seconds


def run(given: Given) -> int:
    """Walk, count, keep."""
    from moetool import measure

    session.working = True
    found = measure.profile(
        given.arguments["moe"],
        given.arguments["stats"],
        build(Profiling, given.values, "profile"),
        tell=session.sink.progress,
        stop=session.stop,
    )
    session.working = False
    for line in found["warnings"]:
        session.sink.say(f"warning: {line}")
    session.sink.result(found)
    if session.sink.mode == "human":
        _show(found)
    return 0


COMMAND = Command(
    "profile",
    "See what each expert does with text, and keep it.\n\nOne profile feeds every method of prune "
    "and merge. One layer in memory at a time.",
    run,
    (
        Argument("moe", "a mixture of experts: a folder, or a Hub id", "MOE"),
        Argument(
            "stats", "folder for the statistics; an unfinished one is taken up again", "STATS"
        ),
    ),
    fields(Profiling),
    (
        "moetool profile my-moe stats --calibrate text.jsonl",
        "moetool profile my-moe stats --calibrate code.jsonl:30% --calibrate prose.txt",
        "moetool profile org/name stats --calibrate text.jsonl --tokens 65536 --memory 16GB",
    ),
    "Measure",
)


def _show(found: JsonObject) -> None:
    sink = session.sink
    model = f"{found['model']['name']}: {found['experts']} experts, top-{found['top_k']}"
    text = f"{found['tokens']:,} tokens in sequences of {found['seq_len']}"
    spent = f"({show_seconds(found['seconds'])}, at most {show_bytes(found['peak_memory'])})"
    sink.line(f"{model}, {len(found['layers'])} layers; {text} {spent}")
    head = ["layer", "least used", "most used", "idle", "largest |out|", "output cosine"]
    sink.table([*head, "REAP least / most"], [_row(r) for r in found["summary"]])
    for peak in found["largest_outputs"]:
        who = f"expert {peak['expert']} of layer {peak['layer']}"
        named = "super expert" if peak["super"] else "no super expert; the largest output"
        sink.line(f"{named}: {who}, {peak['times']:.3g} times the others")
    if len(found["domains"]) > 1:
        sink.table(
            ["file", "share", "use of experts differs from the mix by"],
            [[d["file"], f"{d['share']:.0%}", f"{d['apart']:.1%}"] for d in found["domains"]],
        )


def _row(layer: JsonObject) -> list[object]:
    cosine = "-" if layer["cosine"] is None else f"{layer['cosine']:.2f}"
    return [
        layer["layer"],
        f"{layer['least_used']:.1%}",
        f"{layer['most_used']:.1%}",
        layer["idle"],
        f"{layer['max_out']:.3g}",
        cosine,
        f"{layer['reap_least']:.3g} / {layer['reap_most']:.3g}",
    ]
