"""`moetool schema`: what a recipe may hold, for editors and for CI."""

from __future__ import annotations

import json

from moetool.cli.app import session
from moetool.cli.options import Argument, Command, Given


def run(given: Given) -> int:
    """JSON in every mode but quiet."""
    from moetool.methods.described import schema

    found = schema(given.arguments["verb"])
    session.sink.result(found, json.dumps(found, indent=1, ensure_ascii=False))
    return 0


COMMAND = Command(
    "schema",
    "Print the JSON Schema (draft 2020-12) of a verb's recipe.",
    run,
    (Argument("verb", "upcycle, prune, merge, ...", "VERB"),),
    examples=(
        "moetool schema prune",
        "moetool schema merge --json",
        "moetool schema upcycle > upcycle.schema.json",
    ),
    panel="Look",
)
