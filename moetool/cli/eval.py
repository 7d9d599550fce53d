"""`moetool eval`: perplexity, and the distance from an original."""

from __future__ import annotations

from pathlib import Path

from moetool.cli.app import session
from moetool.cli.options import Argument, Command, Given
from moetool.data import JsonObject
from moetool.measure import Evaluating
from moetool.methods.options import build, fields


def run(given: Given) -> int:
    """Measure, hold against the gates, show."""
    from moetool import measure

    how = build(Evaluating, given.values, "eval")
    session.working = True
    found = measure.evaluate(
        given.arguments["model"], how, tell=session.sink.progress, stop=session.stop
    )
    session.working = False
    for line in found["notes"]:
        session.sink.say(f"note: {line}")
    session.sink.result(found)
    _show(found, compared=bool(how.reference))
    return 0


COMMAND = Command(
    "eval",
    "Perplexity for each file; with --reference, how far the model is from the original.\n\n"
    "One layer in memory at a time: models larger than memory are fine.",
    run,
    (Argument("model", "a folder, or a Hub id; larger than memory is fine", "MODEL"),),
    fields(Evaluating),
    (
        "moetool eval small --text test.jsonl",
        "moetool eval small --text test.jsonl --reference big",
        "moetool eval small --text test.jsonl --reference big --max-perplexity-increase 2%",
    ),
    "Measure",
)


def _show(found: JsonObject, *, compared: bool) -> None:
    head = ["file", "predictions", "perplexity"]
    if compared:
        head += ["original", "increase", "KL", "same top-1", "flips"]
    rows = [_row(row, compared) for row in [*found["files"], {"file": "all", **found}]]
    session.sink.table(head, rows if len(rows) > 2 else rows[:1])


def _row(row: JsonObject, compared: bool) -> list[str]:
    cells = [Path(str(row["file"])).name, f"{row['tokens']:,}", f"{row['perplexity']:.4g}"]
    if not compared:
        return cells
    return [
        *cells,
        f"{row['reference_perplexity']:.4g}",
        f"{row['perplexity_increase']:+.1%}",
        f"{row['kl']:.4f}",
        f"{row['top1_agreement']:.1%}",
        f"{row['flips']:.1%}",
    ]
