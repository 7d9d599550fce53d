"""`moetool guide`: the pages that explain what README only shows."""

from __future__ import annotations

import sys

from moetool import guide
from moetool.cli.app import session
from moetool.cli.options import Argument, Command, Given


def run(given: Given) -> int:
    """A page; without a name, which pages there are."""
    name = given.arguments["page"]
    if not name:
        return _contents()
    found, sink = guide.page(name), session.sink
    sink.result({"page": found.name, "title": found.title, "text": found.text})
    if sink.mode == "human" and sys.stdout.isatty():
        _rendered(found.text)
    else:
        sink.line(found.text.rstrip())
    return 0


def _contents() -> int:
    found, sink = guide.pages(), session.sink
    sink.result({"pages": [{"page": p.name, "title": p.title, "about": p.about} for p in found]})
    width = max(len(p.name) for p in found)
    for each in found:
        sink.line(f"{each.name:<{width}}  {each.about}")
    sink.line("\nnext: moetool guide PAGE")
    return 0


def _rendered(text: str) -> None:
    """On a terminal: headings, tables and code as such, as wide as it is."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


COMMAND = Command(
    "guide",
    "Read a page of the guide: upcycle, smaller, quantize, clients, recipes.",
    run,
    (Argument("page", "its name; left out: which there are", "PAGE", needed=False),),
    examples=(
        "moetool guide",
        "moetool guide upcycle",
        "moetool guide clients --json",
    ),
    panel="Look",
)
