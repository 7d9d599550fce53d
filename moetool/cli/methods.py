"""`moetool methods`: the verbs, their ways, and all options."""

from __future__ import annotations

from moetool.cli.app import session
from moetool.cli.options import Argument, Command, Given
from moetool.data import JsonObject

HELP = "Methods and their options."


def list_(given: Given) -> int:
    """A line each."""
    from moetool.methods.described import listed

    found, sink = listed(), session.sink
    sink.result({"methods": found})
    for verb in found:
        sink.line(f"{verb['name']}: {verb['about']}")
        width = max((len(way["name"]) for way in verb["ways"]), default=0)
        for way in verb["ways"]:
            need = "" if way["text"] else " (needs no text)"
            sink.line(f"  {way['name']:<{width}}  {way['about']}{need}")
    sink.line("\nnext: moetool methods show NAME, of a verb or of a way")
    return 0


def show(given: Given) -> int:
    """One verb, or one way."""
    from moetool.methods.described import describe

    found, sink = describe(given.arguments["name"]), session.sink
    sink.result(found, "\n".join(_lines(found)))
    head = ["option", "type", "default", "meaning"]
    if found["options"]:
        sink.table(head, [_row(o) for o in found["options"]])
    for example in found.get("examples") or [found.get("example")]:
        sink.line(f"  {example}")
    return 0


COMMANDS = (
    Command(
        "list",
        "Every method, with a line each, and its ways.",
        list_,
        examples=(
            "moetool methods list",
            "moetool methods list --json",
            "moetool methods show reap",
        ),
    ),
    Command(
        "show",
        "What a method, or a way of one, does; where it is published; its options.",
        show,
        (Argument("name", "a verb (prune) or a way (reap)", "METHOD"),),
        examples=(
            "moetool methods show prune",
            "moetool methods show reap",
            "moetool methods show upcycle --json",
        ),
    ),
)


def _lines(found: JsonObject) -> list[str]:
    lines = [found["about"], ""]
    if "verb" in found:
        need = "needs text" if found["text"] else "needs no text"
        lines = [f"{found['name']} (moetool {found['verb']}; {need})", found["about"], ""]
    for way in found.get("methods", ()):
        need = "" if way["text"] else " (needs no text)"
        lines += [f"{way['name']}{need}: {way['about']}", ""]
    return lines


def _row(option: JsonObject) -> list[object]:
    default = option["default"]
    shown = "" if default is None or default == [] else default
    return [f"--{option['name']}", option["type"], shown, option["help"]]
